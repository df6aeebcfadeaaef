// The gallery's list, its selection and its large view. The server answers with HTML; what is kept here are the
// question, the place in the list and the selected pictures. 'use', 'image', 'control', 'mask' and 'upscale' go to the tab Create.
const one = (selector) => element.querySelector(selector);
const form = one('.zgp-search'), shots = one('.zgp-shots'), dialog = one('dialog'), shown = one('.zgp-shown');
const notice = one('[data-notice]'), bar = one('.zgp-selected');
let after = null;       // where the next part of the list begins; null at its end
let question = 0;       // the newest one: answers to older ones are dropped
let loading = false;
let current = null;     // the tile that has the focus or is shown large
let anchor = null;      // where a selection with Shift begins
let undoable = [];

// The tiles lie in parts, as they came. Of thousands the browser lays out only those parts that are near.
const tiles = () => [...shots.querySelectorAll('.zgp-shot')];
const next = (tile) => tile.nextElementSibling || tile.parentElement.nextElementSibling?.firstElementChild;
const previous = (tile) => tile.previousElementSibling || tile.parentElement.previousElementSibling?.lastElementChild;
const firstTile = () => shots.querySelector('.zgp-shot');
const lastTile = () => shots.lastElementChild?.lastElementChild;
const id = (tile) => Number(tile.dataset.id);
const selected = () => tiles().filter((tile) => tile.getAttribute('aria-selected') === 'true');
const inTrash = () => form.elements.trash.checked;

const asked = () => {
  const {words, model, lora, size, since, until, order, favourites, trash} = form.elements;
  return {
    words: words.value, model: model.value, lora: lora.value, size: size.value, since: since.value,
    until: until.value, order: order.value, favourites: favourites.checked, trash: trash.checked,
  };
};

const say = (text, undo = []) => {
  undoable = undo;
  notice.hidden = !text;
  notice.querySelector('p').textContent = text || '';
  one('[data-act="undo"]').hidden = !undo.length;
};

const ask = async (name, about = {}) => {
  let answer;
  try {
    answer = await server[name](about);
  } catch {
    answer = {error: 'ZGP does not answer: see whether it still runs, then reload the page.'};
  }
  if (answer.error) say(answer.error);
  return answer.error ? null : answer;
};

// ---------------------------------------------------------------- the list

const parsed = (html) => {
  const holder = document.createElement('template');
  holder.innerHTML = html;
  return [...holder.content.children];
};

const append = (added) => {
  if (!added.length) return;
  const part = document.createElement('div');
  part.className = 'zgp-part';
  part.role = 'group';
  part.append(...added);
  shots.append(part);
  added.forEach((tile) => tile.querySelector('[data-wait]') && waiting.observe(tile));
};

// Whether the list begins with these tiles and is as long as it was. Their small copies may have been made since.
const isKnown = (fresh, count) => {
  const marks = (some) => some.map((tile) => `${tile.dataset.id} ${tile.dataset.favourite}`).join();
  return count === one('[data-count]').textContent && marks(fresh) === marks(tiles().slice(0, fresh.length));
};

const sayCount = (answer) => {
  one('[data-count]').textContent = answer.count;
  one('.zgp-none').textContent = answer.empty;
  one('.zgp-none').hidden = !answer.empty;
};

// more: the next part. look: from the beginning, if anything is new there. again: from the beginning.
const load = async (what) => {
  if (loading && what === 'more') return;
  loading = true;
  const mine = what === 'more' ? question : ++question;
  const answer = await ask('look', {...asked(), after: what === 'more' ? after : null});
  if (mine !== question) return;
  loading = false;
  if (!answer) return;
  const added = parsed(answer.html);
  if (what === 'look' && isKnown(added, answer.count)) return atEnd();
  if (what !== 'more') {
    shots.replaceChildren();
    current = anchor = null;
    sayCount(answer);
    showSelection();
  }
  append(added);
  after = answer.after;
  shots.classList.toggle('zgp-whole', !after);
  atEnd();
};

const again = () => load('again');
const atEnd = () => {  // a tall window is filled by several parts
  const end = one('.zgp-more').getBoundingClientRect();
  if (after && end.height + end.width && end.top < innerHeight + 1200) load('more');
};

const choices = async () => {
  const answer = await ask('choices');
  if (!answer) return;
  for (const name of ['model', 'lora', 'size']) {
    const list = form.elements[name], before = list.value;
    list.innerHTML = answer[name];
    list.value = before;
    if (list.selectedIndex < 0) list.value = '';
  }
  one('[data-trash]').textContent = answer.trash ? `(${answer.trash})` : '';
  one('[data-act="purge"]').hidden = !(inTrash() && answer.trash);
};

// Small copies are asked for when their tiles come near, a few at a time.
const wanted = new Set();
let fetching = false;
const waiting = new IntersectionObserver((entries) => {
  for (const entry of entries) wanted[entry.isIntersecting ? 'add' : 'delete'](entry.target);
  fetchCopies();
}, {rootMargin: '600px'});

const fetchCopies = async () => {
  if (fetching || !wanted.size) return;
  fetching = true;
  const some = [...wanted].slice(0, 12);
  some.forEach((tile) => { wanted.delete(tile); waiting.unobserve(tile); });
  const copies = await ask('thumbs', {ids: some.map(id)});
  for (const tile of some) {
    const url = copies && copies[tile.dataset.id];
    if (url) tile.querySelector('img').src = url;
  }
  fetching = false;
  fetchCopies();
};

// ---------------------------------------------------------------- selection and deeds

const showSelection = () => {
  const count = selected().length, trash = inTrash();
  bar.hidden = !count;
  shots.classList.toggle('zgp-selecting', count > 0);
  bar.querySelector('span').textContent = `${count} selected`;
  one('[data-act="compare"]').hidden = count !== 2;
  one('[data-act="discard-all"]').hidden = one('[data-act="favour-all"]').hidden = trash;
  one('[data-act="restore-all"]').hidden = !trash;
};

const select = (tile, on) => { tile.setAttribute('aria-selected', String(on)); showSelection(); };
const toggle = (tile) => { anchor = tile; select(tile, tile.getAttribute('aria-selected') !== 'true'); };
const selectRange = (tile) => {
  const all = tiles(), ends = [all.indexOf(anchor || current || tile), all.indexOf(tile)].sort((a, b) => a - b);
  all.slice(ends[0], ends[1] + 1).forEach((each) => each.setAttribute('aria-selected', 'true'));
  showSelection();
};
const clear = () => { tiles().forEach((tile) => tile.setAttribute('aria-selected', 'false')); showSelection(); };

const favour = async (some) => {
  const on = some.some((tile) => !tile.dataset.favourite);
  if (!await ask('favour', {ids: some.map(id), favourite: on})) return;
  for (const tile of some) on ? (tile.dataset.favourite = '1') : delete tile.dataset.favourite;
  const button = shown.querySelector('[data-act="favour"]');
  if (button) button.setAttribute('aria-pressed', String(on));
};

const give = (url) => {
  const link = document.createElement('a');
  link.href = url;
  link.download = '';
  link.click();
};

const download = async () => {
  const answer = await ask('pack', {ids: selected().map(id)});
  if (answer) give(answer.url);
};

const comfyui = async () => {
  const answer = await ask('comfyui', {ids: [id(current)]});
  if (!answer) return;
  give(answer.url);
  shut();
  say(answer.said);
};

const remove = async (name, some) => {
  const all = tiles(), follower = all.slice(all.indexOf(some.at(-1)) + 1).find((tile) => !some.includes(tile));
  const answer = await ask(name, {ids: some.map(id)});
  if (!answer) return;
  some.filter((tile) => answer.ids.includes(id(tile))).forEach((tile) => tile.remove());
  [...shots.children].filter((part) => !part.childElementCount).forEach((part) => part.remove());
  say(answer.said, name === 'discard' ? answer.ids : []);
  showSelection();
  recount();
  const here = follower || lastTile();
  if (dialog.open) here ? large(here) : shut();
  else if (here) focus(here);
};

const recount = async () => {
  const mine = question, answer = await ask('look', {...asked(), after: null});
  if (!answer || mine !== question) return;
  sayCount(answer);
  choices();
  atEnd();
};

const find = async () => {
  let answer = await ask('find');
  while (answer) {
    say(answer.said);
    if (!answer.running) break;
    await new Promise((done) => setTimeout(done, 700));
    answer = await ask('found');
  }
  again();
  choices();
};

const purge = async () => {
  if (!confirm('Delete the pictures in the trash for good?')) return;
  const answer = await ask('purge');
  if (answer) say(answer.said);
  again();
  choices();
};

const undo = async () => {
  const answer = await ask('restore', {ids: undoable});
  if (answer) say(answer.said);
  again();
  choices();
};

// ---------------------------------------------------------------- the large view

const focus = (tile) => {
  current = tile;
  tile.focus({preventScroll: true});
  tile.scrollIntoView({block: 'nearest'});
};

const show = (html) => {
  shown.innerHTML = html;
  shown.scrollTop = 0;
  if (!dialog.open) dialog.showModal();
};

const large = async (tile) => {
  current = tile;
  const answer = await ask('detail', {ids: [id(tile)]});
  if (!answer) return;
  dialog.classList.remove('zgp-comparing');
  show(answer.html);
};

const step = async (by) => {
  if (by > 0 && after && !next(current)) await load('more');
  const tile = by > 0 ? next(current) : previous(current);
  if (tile) large(tile);
};

const compare = async () => {
  const answer = await ask('compare', {ids: selected().map(id)});
  if (!answer) return;
  dialog.classList.add('zgp-comparing');
  show(answer.html);
  shown.querySelector('input').focus();
};

const copy = async () => {
  const text = shown.querySelector('.zgp-prompt').textContent;
  const button = shown.querySelector('[data-act="copy"]');
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = 'Copied';
  } catch {  // a page that is not of this computer and has no https may not write there: select it instead
    getSelection().selectAllChildren(shown.querySelector('.zgp-prompt'));
    button.textContent = 'Selected';
  }
};

const shut = () => {
  dialog.close();
  shown.replaceChildren();
  if (current?.isConnected) focus(current);
};

const send = (name) => {
  const sent = {id: id(current)};
  shut();
  scrollTo(0, 0);  // to the lines that say what was taken over
  if (name === 'use') trigger('use', sent);
  if (name === 'image') trigger('image', sent);
  if (name === 'control') trigger('control', sent);
  if (name === 'mask') trigger('mask', sent);
  if (name === 'upscale') trigger('upscale', sent);
};

dialog.addEventListener('cancel', (event) => { event.preventDefault(); shut(); });
shown.addEventListener('input', (event) => {
  event.target.parentElement.style.setProperty('--zgp-cut', `${event.target.value}%`);
});

// ---------------------------------------------------------------- what the user does

const deeds = {
  find, purge, undo, compare, copy, clear, comfyui,
  'close-notice': () => say(''),
  'favour-all': () => favour(selected()),
  'download-all': download,
  'discard-all': () => remove('discard', selected()),
  'restore-all': () => remove('restore', selected()),
  favour: () => favour([current]),
  discard: () => remove('discard', [current]),
  restore: () => remove('restore', [current]),
  use: () => send('use'),
  image: () => send('image'),
  control: () => send('control'),
  mask: () => send('mask'),
  upscale: () => send('upscale'),
  previous: () => step(-1),
  next: () => step(1),
  shut,
};

element.addEventListener('click', (event) => {
  const tile = event.target.closest('.zgp-shot'), act = event.target.closest('[data-act]')?.dataset.act;
  if (tile && held) return;
  if (tile && event.shiftKey) selectRange(tile);
  else if (tile && (act === 'tick' || event.ctrlKey || event.metaKey || !bar.hidden)) toggle(tile);
  else if (tile) large(tile);
  else if (act) deeds[act]?.();
  else if (event.target === dialog) shut();
});

// A long press selects, as on phones.
let held = false, press = 0;
shots.addEventListener('pointerdown', (event) => {
  const tile = event.target.closest('.zgp-shot');
  held = false;
  clearTimeout(press);
  if (tile && event.pointerType !== 'mouse') press = setTimeout(() => { held = true; toggle(tile); }, 500);
});
for (const end of ['pointerup', 'pointercancel', 'pointerleave']) {
  shots.addEventListener(end, () => clearTimeout(press));
}
shots.addEventListener('contextmenu', (event) => { if (held) event.preventDefault(); });

const beside = (tile, rows) => {  // the nearest one in the row above or below
  const from = tile.getBoundingClientRect(), middle = (box) => (box.left + box.right) / 2;
  const part = tile.parentElement, near = [part.previousElementSibling, part, part.nextElementSibling];
  const some = near.flatMap((each) => [...(each?.children ?? [])]);
  const boxes = some.map((each) => [each, each.getBoundingClientRect()]);
  const further = boxes.filter(([, box]) => (rows > 0 ? box.top > from.bottom - 4 : box.bottom < from.top + 4));
  if (!further.length) return null;
  const row = rows > 0 ? Math.min(...further.map(([, box]) => box.top)) : Math.max(...further.map(([, box]) => box.top));
  const there = further.filter(([, box]) => Math.abs(box.top - row) < 4);
  return there.reduce((a, b) => (Math.abs(middle(a[1]) - middle(from)) <= Math.abs(middle(b[1]) - middle(from)) ? a : b))[0];
};

const moves = {
  ArrowRight: () => next(current),
  ArrowLeft: () => previous(current),
  ArrowDown: () => beside(current, 1),
  ArrowUp: () => beside(current, -1),
  Home: firstTile,
  End: lastTile,
};

shots.addEventListener('keydown', (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (!current?.isConnected) current = firstTile();
  if (!current) return;
  const chosen = selected().length ? selected() : [current], key = event.key;
  if (key in moves) focus(document.activeElement === shots ? current : moves[key]() || current);
  else if (key === 'Enter') large(current);
  else if (key === ' ') toggle(current);
  else if ((key === 'f' || key === 'F') && !inTrash()) favour(chosen);
  else if (key === 'Delete' && !inTrash()) remove('discard', chosen);
  else if (key === 'Escape') clear();
  else return;
  event.preventDefault();
});
shots.addEventListener('focusin', (event) => { current = event.target.closest('.zgp-shot') || current; });

dialog.addEventListener('keydown', (event) => {
  event.stopPropagation();  // Esc closes this and nothing else
  if (event.key === 'Escape') {
    event.preventDefault();  // the browser's own way gives the focus back to a tile a moment too late for the next key
    return shut();
  }
  if (event.target.type === 'range' || dialog.classList.contains('zgp-comparing')) return;
  if (event.key === 'ArrowRight') step(1);
  else if (event.key === 'ArrowLeft') step(-1);
  else if ((event.key === 'f' || event.key === 'F') && !inTrash()) favour([current]);
  else if (event.key === 'Delete' && !inTrash()) remove('discard', [current]);
});

let typing = 0;
form.addEventListener('input', (event) => {
  clearTimeout(typing);
  typing = setTimeout(again, event.target.name === 'words' ? 250 : 0);
  if (event.target.name === 'trash') choices();
});
form.addEventListener('submit', (event) => { event.preventDefault(); again(); });
if (innerWidth > 700) one('.zgp-filters').open = true;

for (const event of ['scroll', 'resize']) addEventListener(event, () => atEnd(), {passive: true, capture: true});
// Whenever the tab is shown, it looks whether there is anything new. A hidden tab has no width.
let away = true;
new ResizeObserver(() => {
  const here = element.offsetWidth > 0;
  if (here && away) {
    load('look');
    choices();
  } else if (here) {
    atEnd();
  }
  away = !here;
}).observe(element);
