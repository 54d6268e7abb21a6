// Tables on narrow screens: every cell carries the heading of its column (site.css shows it where rows are stacked), and
// calls may break after a bracket.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("article table.docutils")) {
    const heads = [...table.querySelectorAll("thead th")].map((th) => th.textContent.trim());
    for (const row of table.querySelectorAll("tbody tr")) {
      const [first, ...rest] = row.children;
      if (rest.length && rest.every((cell) => !cell.textContent.trim())) {
        rest.forEach((cell) => cell.remove()); // the title of a group of rows
        first.colSpan = heads.length;
      }
      [...row.children].slice(1).forEach((cell, i) => (cell.dataset.head = heads[i + 1]));
    }
    for (const text of table.querySelectorAll("td code .pre")) {
      text.innerHTML = text.innerHTML.replace(/[(_](?!\))/g, "$&<wbr>");
    }
    const wide = () => table.offsetWidth > table.parentElement.clientWidth;
    table.classList.toggle("stacked", heads.length > 3 || wide());
    table.classList.toggle("tight", wide());
  }
  for (const maths of document.querySelectorAll("article span.math")) {
    maths.classList.toggle("wide", maths.offsetWidth > maths.closest("p, li, td, dd")?.clientWidth);
  }
});
