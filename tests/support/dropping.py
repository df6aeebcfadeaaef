"""Dropping files on the page."""

from __future__ import annotations

DROP = """([data, name]) => {
  const dragged = new DataTransfer();
  dragged.items.add(new File([Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0))], name));
  for (const kind of ['dragenter', 'dragover', 'drop']) {
    document.querySelector('#prompt').dispatchEvent(
      new DragEvent(kind, {dataTransfer: dragged, bubbles: true, cancelable: true}));
  }
}"""
