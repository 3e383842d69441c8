// What scrolls can be reached with the keyboard. The theme wraps tables after the page has loaded.
window.addEventListener("load", () =>
  document.querySelectorAll(".md-typeset__scrollwrap, pre > code").forEach((part) => (part.tabIndex = 0)),
);
