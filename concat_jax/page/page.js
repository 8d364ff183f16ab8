// Pointing at a segment or at a line of the legend shows what it is; the legend hides classes.
(() => {
  const hidden = new Set(); // by name, so that it outlives the next result
  const all = (selector) => document.querySelectorAll("#view " + selector);
  const tip = Object.assign(document.createElement("div"), { id: "tip" });
  tip.setAttribute("aria-hidden", "true"); // a segment's own label says the same

  function show(target, x, y) {
    const one = target.closest?.("#view [data-class]");
    const said = target.closest?.("#view [data-say]");
    all(".lit").forEach((each) => each.classList.remove("lit"));
    if (said) said.classList.add("lit");
    else if (one) all(`path[data-class="${one.dataset.class}"]`).forEach((p) => p.classList.add("lit"));
    all("svg").forEach((svg) => svg.classList.toggle("pointed", Boolean(one)));
    tip.hidden = !said;
    if (!said) return;
    document.body.append(tip);
    tip.textContent = said.dataset.say;
    const half = tip.offsetWidth / 2 + 8;
    tip.style.left = Math.min(Math.max(x, half), document.documentElement.clientWidth - half) + "px";
    tip.style.top = Math.max(y - 14, tip.offsetHeight + 8) + "px";
  }

  function hide(box) {
    const off = hidden.has(box.dataset.name);
    box.checked = !off;
    all(`path[data-class="${box.value}"]`).forEach((path) => path.toggleAttribute("hidden", off));
  }

  for (const kind of ["pointermove", "pointerdown"])
    document.addEventListener(kind, (event) => show(event.target, event.clientX, event.clientY));
  document.addEventListener("focusin", (event) => {
    if (!event.target.matches(":focus-visible")) return;
    const box = event.target.getBoundingClientRect();
    show(event.target, box.x + box.width / 2, box.y + box.height / 2);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") show(document.body);
  });
  document.addEventListener("change", (event) => {
    if (!event.target.matches("#view .legend input")) return;
    hidden[event.target.checked ? "delete" : "add"](event.target.dataset.name);
    hide(event.target);
  });
  // Gradio keeps what is alike of two results and mends its attributes, or puts in new elements.
  new MutationObserver(() => hidden.size && all(".legend input").forEach(hide)).observe(
    document.documentElement,
    { childList: true, subtree: true, attributeFilter: ["hidden", "data-class", "data-name"] },
  );
})();
