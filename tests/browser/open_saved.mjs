// Opens saved workflows and tells which values the nodes have then.
// Input: {url, workflows: [[name, workflow], ...]}; prints [[name, {node id: {type, values}}], ...] as JSON.

import { request, withComfyUI } from "./comfyui.mjs";

const { url, workflows, picture } = await request();
await withComfyUI(url, async (comfy) => {
  const answer = [];
  for (const [name, workflow] of workflows) {
    await comfy.load(workflow);
    answer.push([name, await comfy.values()]);
  }
  if (picture) await comfy.picture(picture);
  console.log(JSON.stringify(answer));
});
