document.addEventListener("change", (event) => {
  const input = event.target;
  if (!input.matches || !input.matches("#folder input[type=file]")) return;
  const named = new DataTransfer();
  for (const file of input.files) {
    named.items.add(new File([file], file.webkitRelativePath || file.name, {type: file.type}));
  }
  input.files = named.files;
}, true);
const filesOf = async (entry) => {  // of a folder that is dropped, with its place in the name of each
  if (entry.isFile) {
    const file = await new Promise((done, failed) => entry.file(done, failed));
    return [new File([file], entry.fullPath.slice(1), {type: file.type})];
  }
  const reader = entry.createReader(), found = [];
  for (;;) {  // a hundred at a time
    const some = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!some.length) break;
    for (const other of some) found.push(...await filesOf(other));
  }
  return found;
};
document.addEventListener("drop", async (event) => {
  const box = event.target.closest && event.target.closest("#folder"), input = box && box.querySelector("input");
  if (!input) return;
  event.preventDefault();
  event.stopPropagation();
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  event.target.dispatchEvent(new DragEvent("dragleave", {bubbles: true}));
  const given = new DataTransfer();
  for (const entry of entries) for (const file of await filesOf(entry)) given.items.add(file);
  input.files = given.files;
  input.dispatchEvent(new Event("change", {bubbles: true}));
}, true);
document.addEventListener("paste", (event) => {
  const image = [...event.clipboardData.files].find((file) => file.type.startsWith("image/"));
  const input = document.querySelector("#image input[type=file]");
  if (!image || !input) return;
  const given = new DataTransfer();
  given.items.add(image);
  input.files = given.files;
  input.dispatchEvent(new Event("change", {bubbles: true}));
});
for (const kind of ["error", "load"]) {  // no broken-image sign where a message says what is wrong
  document.addEventListener(kind, (event) => {
    if (event.target.matches && event.target.matches("#image img")) {
      event.target.style.visibility = kind === "error" ? "hidden" : "";
    }
  }, true);
}
