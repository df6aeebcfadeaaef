// What this browser has chosen for itself: the colours, a sign when the queue is done, the prompt after a reload.
const kept = 'zgp-form';
const read = (name) => {
  try {
    return localStorage.getItem(name);
  } catch {  // a browser that keeps nothing for this page
    return null;
  }
};

const system = matchMedia('(prefers-color-scheme: dark)');
const paint = () => {
  const theme = read('zgp-theme');
  if (theme === 'light' || theme === 'dark') document.body.classList.toggle('dark', theme === 'dark');
};
system.addEventListener('change', () => setTimeout(paint));
paint();

const sound = () => {
  const audio = new AudioContext();
  const tone = audio.createOscillator();
  const volume = audio.createGain();
  volume.gain.setValueAtTime(0.2, audio.currentTime);
  volume.gain.exponentialRampToValueAtTime(0.001, audio.currentTime + 0.6);
  tone.frequency.value = 660;
  tone.connect(volume).connect(audio.destination);
  tone.start();
  tone.stop(audio.currentTime + 0.6);
  document.body.dataset.zgpDone = 'sound';
};
const notice = () => {
  if (Notification.permission === 'granted') new Notification('ZGP', {body: 'The queue is done.'});
  document.body.dataset.zgpDone = 'notice';
};
const signs = {'sound': sound, 'notice': notice};

window.addEventListener('zgp-choice', (event) => {
  if (event.detail === 'zgp-theme') {
    if (read('zgp-theme') === 'system') document.body.classList.toggle('dark', system.matches);
    paint();
  } else if (event.detail === 'zgp-done' && read('zgp-done') === 'notice' && 'Notification' in window) {
    Notification.requestPermission();
  } else if (event.detail === 'zgp-keep' && read('zgp-keep') === 'no') {
    localStorage.removeItem(kept);
  }
});

// The stage is empty exactly while nothing runs or waits.
let busy = false;
const listen = () => {
  const stage = document.getElementById('stage');
  if (!stage) return setTimeout(listen, 500);
  new MutationObserver(() => {
    const now = Boolean(stage.querySelector('.zgp-stage'));
    if (busy && !now) signs[read('zgp-done')]?.();
    busy = now;
  }).observe(stage, {childList: true, subtree: true});
};
listen();

window.zgpKeep = (values) => {
  if (read('zgp-keep') === 'no') return;
  try {
    localStorage.setItem(kept, JSON.stringify(values.map((value) => value || '')));
  } catch {}  // the browser's room is full: the page works without
};
let before = null;
try {
  before = JSON.parse(read(kept));
} catch {
  localStorage.removeItem(kept);
}
// After the page has been painted: it waits for nothing here.
requestAnimationFrame(() => setTimeout(() => {
  trigger('restore', {kept: Array.isArray(before) && read('zgp-keep') !== 'no' ? before : null});
}));
