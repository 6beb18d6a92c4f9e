// The copy button. It also tells the kernel how much room the picture has, and gives sliders the name that their
// label shows, which ipywidgets leaves out.
export default { render({ model, el }) {
  const button = document.createElement("button");
  button.className = "jupyter-button lm-Widget wb-copy-button";
  button.textContent = "Copy";
  button.onclick = async () => {
    const text = model.get("text");
    try { await navigator.clipboard.writeText(text); }
    catch (refused) {
      const area = document.createElement("textarea");
      area.value = text; document.body.append(area); area.select(); document.execCommand("copy"); area.remove(); button.focus();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
  el.append(button);

  const nameSliders = (left) => left.querySelectorAll(".widget-inline-hbox").forEach((row) => {
    const outer = row.closest(".wb-log") ?? row, label = outer.querySelector(".widget-label")?.textContent;
    row.querySelectorAll("[role=slider], .widget-readout, input[type=number]").forEach((part) => label && part.setAttribute("aria-label", label));
  });
  const measure = (right) => {
    const room = Math.round(right.clientWidth);
    if (room > 0 && Math.abs(room - model.get("room")) > 20) { model.set("room", room); model.save_changes(); }
  };
  const names = new MutationObserver((seen) => nameSliders(seen[0].target.closest(".wb-left")));
  const sizes = new ResizeObserver((seen) => measure(seen[0].target));
  const begin = () => {
    const bench = el.closest(".wb-bench"), left = bench?.querySelector(".wb-left"), right = bench?.querySelector(".wb-answer");
    if (!left || !right) return el.isConnected ? undefined : setTimeout(begin, 100);
    nameSliders(left);
    names.observe(left, { childList: true, subtree: true });
    sizes.observe(right);
  };
  requestAnimationFrame(begin);
  return () => { names.disconnect(); sizes.disconnect(); };
} };
