// A file dragged over the page shows the target; where it is let go outside of a file field, that field gets it.
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
  const input = document.querySelector(`#${target.dataset.field} input[type="file"]`);
  if (!input) return;
  document.querySelector('#tabs [role="tab"]')?.click();  // Create, where the field is
  const one = new DataTransfer();
  one.items.add(event.dataTransfer.files[0]);
  input.files = one.files;
  input.dispatchEvent(new Event('change', {bubbles: true}));
});
