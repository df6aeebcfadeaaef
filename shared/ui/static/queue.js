// The queue's list: its buttons, and dragging by mouse, pen or finger. `trigger` says what was done:
// act {act, id, other}, edit {id}, save.
const say = (act, id = 0, other = 0) => trigger(act === 'edit' || act === 'save' ? act : 'act', {act, id, other});

// A list that is drawn anew must not take the focus from whoever works with the keyboard.
let pressed = null;
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-act]');
  if (!button || (button.dataset.confirm && !confirm(button.dataset.confirm))) return;
  pressed = event.detail ? null : {act: button.dataset.act, job: button.dataset.job};
  if (button.dataset.act === 'load') document.getElementById('queue-load').click();
  else say(button.dataset.act, Number(button.dataset.job));
});
new MutationObserver(() => {
  const focused = document.activeElement;
  if (!pressed || !(focused === document.body || element.contains(focused))) return;
  const button = element.querySelector(`button[data-act="${pressed.act}"][data-job="${pressed.job}"]`);
  if (button && focused !== button) button.focus();
}).observe(element, {childList: true, subtree: true, attributeFilter: ['data-job']});

let dragged = null, before = null;
const rows = () => [...element.querySelectorAll('li[data-waits="1"]')];
const mark = (row, name) => {
  for (const one of rows()) one.classList.remove('zgp-before', 'zgp-after');
  row?.classList.add(name);
};
const move = (event) => {
  const list = element.querySelector('.zgp-job-list'), frame = list.getBoundingClientRect();
  if (event.clientY < frame.top + 24) list.scrollTop -= 12;
  if (event.clientY > frame.bottom - 24) list.scrollTop += 12;
  const all = rows();
  before = all.find((row) => {
    const box = row.getBoundingClientRect();
    return event.clientY < box.top + box.height / 2;
  }) || null;
  mark(before || all.at(-1), before ? 'zgp-before' : 'zgp-after');
};
const stop = () => {
  for (const name of ['pointermove', 'pointerup', 'pointercancel']) document.removeEventListener(name, hands[name]);
  mark(null);
  dragged = null;
};
const drop = () => {
  const id = dragged, other = Number(before?.dataset.id || 0);
  stop();
  if (other !== id) say(other ? 'before' : 'last', id, other);
};
const hands = {pointermove: move, pointerup: drop, pointercancel: stop};
element.addEventListener('pointerdown', (event) => {
  const row = event.target.closest('.zgp-grip')?.closest('li');
  if (!row || event.button) return;
  event.preventDefault();
  dragged = Number(row.dataset.id);
  before = row;
  for (const name of Object.keys(hands)) document.addEventListener(name, hands[name]);
});
