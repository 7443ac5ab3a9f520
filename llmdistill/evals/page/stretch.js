// Browsers stretch brackets and braces only with a mathematical font. Where there is none they are scaled: brackets to
// the height of what they enclose, braces and arrows to the width of what they are above or below.
let stretches = null;

const mathElement = (tag, attributes, ...children) => {
  const node = document.createElementNS("http://www.w3.org/1998/Math/MathML", tag);
  for (const [key, value] of Object.entries(attributes ?? {})) node.setAttribute(key, value);
  node.append(...children);
  return node;
};

function stretched(box) {
  const size = (node) => node.getBoundingClientRect();
  if (stretches === null) {
    const mark = mathElement("mo", { stretchy: "true", form: "prefix" }, "(");
    const tall = mathElement("mspace", { height: "5em", width: "1em" });
    const probe = mathElement("math", null, mathElement("mrow", null, mark, tall));
    box.append(probe);
    stretches = size(mark).height > 4 * Number.parseFloat(getComputedStyle(probe).fontSize);
    probe.remove();
  }
  if (stretches) return;
  const changes = []; // all is measured before anything is changed
  for (const mark of box.querySelectorAll("math mo[stretchy=true]")) {
    const [own, whole] = [size(mark), size(mark.parentElement)];
    if (mark.getAttribute("fence") && own.height && whole.height > 1.25 * own.height && !mark.hasAttribute("minsize")) {
      const shift = (whole.top + whole.bottom - own.top - own.bottom) / 2;
      changes.push([mark, `translateY(${shift.toFixed(1)}px) scaleY(${(whole.height / own.height).toFixed(3)})`]);
    } else if (/^m(?:under|over)$/.test(mark.parentElement.localName) && own.width && whole.width > 1.2 * own.width) {
      changes.push([mark, `scaleX(${(whole.width / own.width).toFixed(3)})`]);
    }
  }
  for (const [mark, transform] of changes) mark.style.transform = transform;
}
