"use strict";
/* Markdown as models write it, as nodes of the page: every character is text, nothing is ever read as HTML.
   Paragraphs, headings, lists, quotes, code, tables of pipes as text; `code`, **strong**, *emphasis*. A link is shown
   as its words and its address, and leads nowhere. */
function markdown(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const out = document.createDocumentFragment();
  const starts = { fence: /^\s*(```|~~~)/, heading: /^(#{1,6})\s+(.*)/, item: /^\s*(?:[-*+]|\d{1,9}[.)])\s+(.*)/, quote: /^\s*>\s?(.*)/ };
  const ordered = /^\s*\d{1,9}[.)]\s/;
  const begins = (line) => !line.trim() || Object.values(starts).some((start) => start.test(line));
  for (let k = 0; k < lines.length;) {
    const line = lines[k];
    let found;
    if (!line.trim()) { k += 1; }
    else if ((found = line.match(starts.fence))) {
      const code = [];
      for (k += 1; k < lines.length && !lines[k].trim().startsWith(found[1]); k += 1) code.push(lines[k]);
      k += 1;
      const box = node("pre");
      box.tabIndex = 0;  // so that the keyboard can scroll it
      box.append(node("code", code.join("\n")));
      out.append(box);
    } else if ((found = line.match(starts.heading))) {
      out.append(inline(node("p", "", "heading"), found[2]));
      k += 1;
    } else if (starts.item.test(line)) {
      const list = node(ordered.test(line) ? "ol" : "ul", "", "plain");
      for (; k < lines.length && (found = lines[k].match(starts.item)); k += 1) list.append(inline(node("li"), found[1]));
      out.append(list);
    } else if (starts.quote.test(line)) {
      const quoted = [];
      for (; k < lines.length && (found = lines[k].match(starts.quote)); k += 1) quoted.push(found[1]);
      out.append(inline(node("blockquote"), quoted.join("\n")));
    } else {
      const words = [line];
      for (k += 1; k < lines.length && !begins(lines[k]); k += 1) words.push(lines[k]);
      out.append(inline(node("p"), words.join("\n")));
    }
  }
  return out;
}

function node(tag, text = "", kind = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

const MARKS = /(`[^`\n]+`)|\*\*([^*\n]+)\*\*|__([^_\n]+)__|\*([^*\s][^*\n]*)\*|!?\[([^\]\n]*)\]\(([^)\s]*)\)/g;

function inline(box, text) {
  let at = 0;
  for (const found of text.matchAll(MARKS)) {
    box.append(text.slice(at, found.index));
    const [whole, code, strong, strongly, emphasis, label, address] = found;
    if (code) box.append(node("code", code.slice(1, -1)));
    else if (strong ?? strongly) box.append(node("strong", strong ?? strongly));
    else if (emphasis) box.append(node("em", emphasis));
    else box.append(label === address ? label : `${label} (${address})`);
    at = found.index + whole.length;
  }
  box.append(text.slice(at));
  return box;
}
