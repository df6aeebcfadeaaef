// A file dragged over the page shows the target; let go outside of a file field, it goes to the field of its kind.
const target = element.querySelector('.zgp-drop-target');
const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes('Files');
const ownField = (event) => event.target.closest?.('input[type="file"], .zgp-drop, #drop, [data-testid="file-upload"], .upload-container');
let leaving = 0;

const show = (on) => { target.hidden = !on; };

document.addEventListener('dragover', (event) => {
  if (!hasFiles(event)) return;
  clearTimeout(leaving);
  leaving = setTimeout(() => show(false), 300);  // no event tells that a drag has left the window or ended
  show(!ownField(event));
  if (!ownField(event)) event.preventDefault();
});

document.addEventListener('drop', (event) => {
  show(false);
  if (!hasFiles(event) || ownField(event) || !event.dataTransfer.files.length) return;
  event.preventDefault();
  const file = event.dataTransfer.files[0], ending = file.name.toLowerCase().match(/\.[^.]*$/)?.[0] ?? '';
  const fields = JSON.parse(target.dataset.fields);
  document.querySelector('#tabs [role="tab"]')?.click();  // Create, where the fields are
  const field = document.getElementById(fields[ending]);  // the input of a button stands before it
  const input = [field?.querySelector('input[type="file"]'), field?.previousElementSibling].find((one) => one?.type === 'file');
  if (!input) return trigger('refused', {ending});
  const one = new DataTransfer();
  one.items.add(file);
  input.files = one.files;
  input.dispatchEvent(new Event('change', {bubbles: true}));
});
