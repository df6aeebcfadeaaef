// Ctrl+Enter generates, Esc cancels. A tab that comes back into view looks at the queue again, so an idle
// page needs no timer.
() => {
  const press = (id) => {
    const button = document.getElementById(id);
    if (button && button.offsetParent !== null && !button.disabled) button.click();
  };
  document.addEventListener("keydown", (event) => {
    const typing = document.activeElement;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      press("generate");
    } else if (event.key === "Escape" && (typing === document.body || typing.tagName === "TEXTAREA")) {
      press("cancel");
    }
  });
}
