// Runs workflows and tells what the page made of the nodes' texts.
// Input: {url, workflows: [[name, workflow], ...], pictures, close}: `pictures` is a folder for a picture of each, and of each
// node whose id is in the list `close`. Prints {name: {texts: [[text, HTML], ...], hacked}, "name error", faults} as JSON.

import { request, withComfyUI } from "./comfyui.mjs";

const { url, pictures, close = [], workflows } = await request();
const answer = {};
await withComfyUI(url, async (comfy) => {
  for (const [name, workflow] of workflows) {
    await comfy.load(workflow);
    await comfy.run().catch((error) => (answer[`${name} error`] = String(error)));
    if (pictures) {
      await comfy.picture(`${pictures}/${name}.png`);
      for (const id of close) await comfy.picture(`${pictures}/${name}-${id}.png`, id);
    }
    answer[name] = await comfy.page.evaluate(() => ({
      // the classic canvas and Nodes 2.0
      texts: [...document.querySelectorAll(".dom-widget span, .widget-markdown, .comfy-markdown-content")].map((shown) => [shown.innerText, shown.innerHTML]),
      hacked: window.hacked ?? null,
    }));
  }
  answer.faults = comfy.faults;
});
console.log(JSON.stringify(answer));
