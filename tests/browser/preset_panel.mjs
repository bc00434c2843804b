// Opens the menu of presets of Block Weights on files that people have, and presses what it is told to.
// Input: {url, picture, steps: [["store", file, text] | ["open"] | ["delete", name] | ["import", file, text, yes] | ["save", name, yes]]};
// prints [{files, said, hacked}, ...] after every step as JSON.

import { request, withComfyUI } from "./comfyui.mjs";

const { url, picture, steps } = await request();
const FOLDER = "trilora/presets";

async function dialog(page, button) {
  await page.waitForTimeout(500);
  await page.locator(".p-dialog button, [role=dialog] button").filter({ hasText: button }).last().click();
  await page.waitForTimeout(500);
}

const act = {
  store: ({ page }, file, text) => page.evaluate(([path, content]) => window.app.api.storeUserData(path, content, { overwrite: true, stringify: false, throwOnError: true }), [`${FOLDER}/${file}`, text]),
  async open({ page }) {
    const menu = page.locator(".trilora-presets");
    if (await menu.count()) await page.keyboard.press("Escape");
    await page.locator(".trilora-blocks button", { hasText: "Presets" }).first().click();
    await page.waitForTimeout(1200);
  },
  async delete(comfy, name) {
    await act.open(comfy);
    await comfy.page.locator(`.trilora-presets button[title^="Delete ${name} "]`).click();
  },
  async import(comfy, file, text, yes) {
    await act.open(comfy);
    await comfy.page.locator(".trilora-presets input[type=file]").setInputFiles({ name: file, mimeType: "text/plain", buffer: Buffer.from(text) });
    if (yes !== undefined) await dialog(comfy.page, yes ? /overwrite|confirm|ok|yes/i : /cancel|no/i);
  },
  async save(comfy, name, yes) {
    await act.open(comfy);
    await comfy.page.locator(".trilora-presets button", { hasText: "Save" }).click();
    await comfy.page.waitForTimeout(700);
    await comfy.page.keyboard.type(name);
    await comfy.page.keyboard.press("Enter");
    if (yes !== undefined) await dialog(comfy.page, yes ? /overwrite|confirm|ok|yes/i : /cancel|no/i);
  },
};

await withComfyUI(url, async (comfy) => {
  await comfy.load({ 1: { class_type: "TriLoRABlockWeights", inputs: { weights: "default=1, IN=0" } } });
  await comfy.picture(picture ? `${picture}/panel.png` : undefined);
  const answer = [];
  for (const [number, [kind, ...rest]] of steps.entries()) {
    await act[kind](comfy, ...rest);
    await comfy.page.waitForTimeout(1000);
    if (picture) await comfy.page.screenshot({ path: `${picture}/${number}-${kind}.png` });
    answer.push(await comfy.page.evaluate(async (folder) => {
      const read = async (name) => (await (await window.app.api.getUserData(`${folder}/${name}`)).text());
      const names = (await window.app.api.listUserDataFullInfo(folder)).map((file) => file.path.split("/").at(-1));
      return {
        files: Object.fromEntries(await Promise.all(names.map(async (name) => [name, await read(name)]))),
        said: [...document.querySelectorAll(".p-toast-detail")].map((one) => one.textContent),
        menu: [...document.querySelectorAll(".trilora-presets .mine .use span:first-child")].map((one) => one.textContent),
        hacked: window.hacked ?? null,
      };
    }, FOLDER));
  }
  console.log(JSON.stringify({ steps: answer, faults: comfy.faults }));
});
