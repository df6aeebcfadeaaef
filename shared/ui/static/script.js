// Ctrl+Enter generates, Esc cancels; on a phone, where the pictures lie below the form, Generate goes there.
() => {
  const press = (id) => {
    const button = document.getElementById(id);
    if (button && button.offsetParent !== null && !button.disabled) button.click();
  };
  document.addEventListener("keydown", (event) => {
    const focused = document.activeElement;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      press("generate");
    } else if (event.key === "Escape" && event.isTrusted && (focused === document.body || focused.tagName === "TEXTAREA")) {
      press("cancel");
    }
  });

  // A button with data-ask asks first: the second press within a few seconds counts.
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-ask]");
    if (!button || button.dataset.asked) return;
    event.stopPropagation();
    const words = button.textContent;
    button.textContent = button.dataset.ask;
    button.dataset.asked = "yes";
    setTimeout(() => {
      button.textContent = words;
      delete button.dataset.asked;
    }, 5000);
  }, true);

  document.addEventListener("click", (event) => {
    if (innerWidth > 700 || !event.target.closest("#generate")) return;
    setTimeout(() => document.getElementById("results").scrollIntoView({ behavior: "smooth" }), 300);
  });

  // Gradio leaves the list of a dropdown open when a value of one's own is typed into it and the focus moves on.
  document.addEventListener("focusout", (event) => {
    if (event.target.getAttribute("role") !== "combobox") return;
    setTimeout(() => event.target.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true })), 50);
  });
}
