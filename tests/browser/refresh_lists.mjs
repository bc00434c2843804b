// Runs workflows and tells how often the lists of files were read anew, and what a loader lists then.
// Input: {url, workflows: [[name, workflow], ...]}; prints [{refreshed, listed}, ...] as JSON.

import { request, withComfyUI } from "./comfyui.mjs";

const { url, workflows } = await request();
await withComfyUI(url, async (comfy) => {
  await comfy.page.evaluate(() => {
    const { refreshComboInNodes } = window.app;
    window.refreshed = 0;
    window.app.refreshComboInNodes = function () {
      window.refreshed += 1;
      return refreshComboInNodes.apply(this, arguments);
    };
  });
  const answer = [];
  for (const [, workflow] of workflows) {
    await comfy.load(workflow);
    await comfy.run();
    await comfy.page.waitForTimeout(2500);
    answer.push(await comfy.page.evaluate(() => {
      const widget = window.app.graph.nodes.find((node) => node.type === "TriLoRALoadAdapter").widgets.find((one) => one.name === "lora_name");
      const { values } = widget.options;
      return { refreshed: window.refreshed, listed: [...(typeof values === "function" ? values() : values)] };
    }));
  }
  console.log(JSON.stringify(answer));
});
