// --- Text: whatever it holds, it becomes text nodes ---

// Characters that are invisible, or reorder what stands beside them, are shown by their numbers. Marks that scripts need
// (joiners, directional marks) are left alone.
const ODD = /([\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u00ad\u115f\u1160\u180e\u200b\u202a-\u202e\u2028\u2029\u2060-\u2069\u2800\u3164\ufeff\uffa0\ufff9-\ufffb]|[\u{e0000}-\u{e007f}])\1*/gu;

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

function text(content) {
  const made = element("div", "text");
  made.dir = "auto";
  let from = 0;
  for (const match of content.matchAll(ODD)) {
    const code = match[1].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    const times = match[0].length / match[1].length;
    made.append(content.slice(from, match.index), element("span", "odd", `U+${code}${times > 1 ? ` x${times}` : ""}`));
    from = match.index + match[0].length;
  }
  made.append(content.slice(from));
  if (!/[^\s\p{Default_Ignorable_Code_Point}]/u.test(content)) made.append(element("span", "odd", "nothing visible"));
  return made;
}
