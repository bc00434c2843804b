// Loads workflows one after the other, runs each, and saves what the front end then holds.
// Input: {url, folder, workflows: [[name, workflow], ...]}; writes folder/NAME.json and folder/NAME.png.

import { writeFileSync } from "node:fs";
import { request, withComfyUI } from "./comfyui.mjs";

const { url, folder, workflows } = await request();
await withComfyUI(url, async (comfy) => {
  for (const [name, workflow] of workflows) {
    await comfy.load(workflow);
    await comfy.run();
    writeFileSync(`${folder}/${name}.json`, `${JSON.stringify(await comfy.saved(), null, 1)}\n`);
    await comfy.picture(`${folder}/${name}.png`);
    console.log(`${name}: saved`);
  }
  for (const fault of comfy.faults) console.log(`script error: ${fault}`);
});
