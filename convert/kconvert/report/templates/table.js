"use strict";
// Sorts and filters TABLE = {columns, rows}; the last entry of a row says whether it is faulty.
(function () {
  const STEP = 100;
  const head = document.querySelector("#weights thead");
  const body = document.querySelector("#weights tbody");
  const filter = document.getElementById("filter");
  const count = document.getElementById("count");
  let rows = TABLE.rows, sorted = -1, ascending = true, shown = STEP;

  const heading = head.insertRow();
  TABLE.columns.forEach((name, column) => {
    const cell = document.createElement("th");
    const button = cell.appendChild(document.createElement("span"));
    button.textContent = name.replaceAll("_", " ");
    cell.tabIndex = 0;
    cell.addEventListener("click", () => sort(column));
    cell.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(column); });
    heading.append(cell);
  });

  function text(value, column) {
    if (value === null) return TABLE.columns[column] === "sqnr" ? "no error" : "";
    if (typeof value !== "number" || Number.isInteger(value)) return String(value);
    return TABLE.columns[column] === "cosine" ? value.toFixed(6) : String(Number(value.toPrecision(4)));
  }

  // No error is an infinite SQNR; what a row does not have goes last.
  function rank(row) {
    const value = row[sorted];
    return value === null ? Infinity : value;
  }

  function sort(column) {
    ascending = sorted === column ? !ascending : true;
    sorted = column;
    [...heading.cells].forEach((cell, i) => {
      if (i === column) cell.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      else cell.removeAttribute("aria-sort");
    });
    draw();
  }

  // Every word must be in the name or the role, or be column:value.
  function matches(row, words) {
    return words.every((word) => {
      const [column, value] = word.split(":");
      const place = TABLE.columns.indexOf(column);
      if (value !== undefined && place >= 0) return String(row[place]) === value;
      return row[0].toLowerCase().includes(word) || row[1].toLowerCase().includes(word);
    });
  }

  function draw() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows = TABLE.rows.filter((row) => matches(row, words));
    if (sorted >= 0) {
      rows.sort((a, b) => {
        const [x, y] = [rank(a), rank(b)];
        const order = x < y ? -1 : x > y ? 1 : 0;
        return ascending ? order : -order;
      });
    }
    body.replaceChildren(...rows.slice(0, shown).map(line));
    if (rows.length > shown) body.append(more());
    count.textContent = `${rows.length.toLocaleString("en")} of ${TABLE.rows.length.toLocaleString("en")}`;
  }

  function line(row) {
    const element = document.createElement("tr");
    TABLE.columns.forEach((_, column) => { element.insertCell().textContent = text(row[column], column); });
    if (row[TABLE.columns.length]) element.className = "bad";
    return element;
  }

  function more() {
    const element = document.createElement("tr");
    const button = element.insertCell().appendChild(document.createElement("button"));
    button.textContent = "Show more";
    button.addEventListener("click", () => { shown += 10 * STEP; draw(); });
    return element;
  }

  filter.addEventListener("input", () => { shown = STEP; draw(); });
  draw();
})();
