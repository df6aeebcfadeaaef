// What a click in the LoRA group does to the list and to the text of their strengths. It happens in the page
// and not on the server, so that Generate, pressed right after it, already sends the change. `window.zgpLora`
// says what was done: {act: "toggle", entry} | {act: "remove", index} | {act: "set", index, value}.
(loras, text) => {
  const {act, entry, index, value} = window.zgpLora;
  const bare = text.replace(/#[^\n]*/g, (comment) => " ".repeat(comment.length));
  const words = [...bare.matchAll(/[^\s|]+/g)];
  const put = (at, word) => {
    if (words[at]) return text.slice(0, words[at].index) + word + text.slice(words[at].index + words[at][0].length);
    const gap = text.lastIndexOf("#") > text.lastIndexOf("\n") ? "\n" : /[^\s|]$/.test(text) ? " " : "";
    return text + gap + "1 ".repeat(at - words.length) + word;
  };
  const take = (at) => (words[at] ? put(at, "").replace(/^ +| +$/g, "").replace(/  +/g, " ") : text);
  const without = (at) => [loras.filter((_, i) => i !== at), take(at)];
  if (act === "set") return [loras, put(index, value)];
  if (act === "remove") return without(index);
  return loras.includes(entry) ? without(loras.indexOf(entry)) : [[...loras, entry], text];
}
