// The tab "Settings": its buttons, and the choices that stay in this browser.
const choices = () => element.querySelectorAll('.zgp-browser select');
const read = (name, fallback) => localStorage.getItem(name) || fallback;

const copy = async (button) => {
  const text = button.parentElement.querySelector('details:last-of-type pre').textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // a page that did not come over https has no clipboard
    const area = document.createElement('textarea');
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
  }
  button.textContent = 'Copied';
};

const values = () => {
  const found = {};
  for (const control of element.querySelector('form').elements) {
    if (control.name) found[control.name] = control.type === 'checkbox' ? (control.checked ? 'yes' : '') : control.value;
  }
  return found;
};

element.addEventListener('click', (event) => {
  if (event.target.closest('.zgp-close')) event.target.closest('.zgp-notice').remove();
  const button = event.target.closest('button[data-act]');
  if (!button) return;
  const act = button.dataset.act;
  if (act === 'copy') copy(button);
  else trigger('act', {name: act, values: values()});
});
element.addEventListener('submit', (event) => {
  event.preventDefault();
  trigger('act', {name: 'save', values: values()});
});
element.addEventListener('change', (event) => {
  if (!event.target.closest('.zgp-browser')) return;
  localStorage.setItem(event.target.name, event.target.value);
  window.dispatchEvent(new CustomEvent('zgp-choice', {detail: event.target.name}));
});

// What comes from the server shows what is saved, whatever was typed before.
new MutationObserver(() => {
  element.querySelector('form')?.reset();
  for (const select of choices()) select.value = read(select.name, select.options[0].value);
}).observe(element, {childList: true, subtree: true, attributes: true, attributeFilter: ['value', 'selected', 'checked']});
