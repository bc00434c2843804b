// Makes a file that a run has saved appear in all lists of files, once at the end of the run.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

let isNew = false; // a file that the lists do not have yet

api.addEventListener("trilora.saved", () => (isNew = true));
for (const end of ["execution_success", "execution_error", "execution_interrupted"]) api.addEventListener(end, refresh);
// only the page that queued a run hears of its end; the others hear of an empty queue
api.addEventListener("status", ({ detail }) => detail?.exec_info?.queue_remaining === 0 && refresh());

function refresh() {
  if (!isNew) return;
  isNew = false;
  app.refreshComboInNodes().catch((error) => console.warn("TriLoRA: the lists of files were not refreshed", error));
}
