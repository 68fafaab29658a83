"use strict";
(() => {
  const $ = (selector, from = document) => [...from.querySelectorAll(selector)];
  const make = (name, set = {}, ...inner) => {
    const element = Object.assign(document.createElement(name), set);
    element.append(...inner);
    return element;
  };
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Set();
  // Seconds between two loads of a page that is written again and again; 0 for any other.
  const every = Number(document.documentElement.dataset.watch || 0);
  let drawing = 0;

  // ---------------------------------------------------------------- charts
  // Colours come from the style sheet, so that the charts follow the page between light and dark.
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const template = () => {
    const axis = {gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"),
      automargin: true, ticks: "outside", ticklen: 6, tickcolor: "rgba(0,0,0,0)", title: {standoff: 10}};
    return {layout: {
      font: {family: getComputedStyle(document.body).fontFamily, size: 12.5, color: colour("--fg")},
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis,
      hoverlabel: {bgcolor: colour("--bg"), bordercolor: colour("--line"), font: {color: colour("--fg")},
        align: "left"},
      showlegend: false, margin: {l: 12, r: 16, t: 12, b: 12},
      modebar: {bgcolor: "rgba(0,0,0,0)", color: colour("--muted"), activecolor: colour("--fg")},
      hovermode: "closest"}};
  };
  // The wanted buttons by name: a later version's new ones (this one's uploads the chart) stay away.
  const show = (place, figure, layout) => Plotly.react(place, figure, layout, {responsive: true, displaylogo: false,
      showSendToCloud: false, plotlyServerURL: "", showLink: false, showEditInChartStudio: false,
      modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]]});

  // Long names cut in the middle, for rows mostly differ at their ends; as far as no two of them become one.
  const short = (texts, most) => {
    const cut = (text, n) => (text.length <= n ? text
      : text.slice(0, Math.ceil((n - 1) / 2)) + "…" + text.slice(-Math.floor((n - 1) / 2)));
    const names = texts.map((text) => cut(text, most));
    const alike = (i) => names.some((name, j) => name === names[i] && texts[j] !== texts[i]);
    const longer = texts.filter((text, i) => alike(i));
    const known = longer.length ? short(longer, most + 4) : [];
    return names.map((name, i) => (alike(i) ? known[longer.indexOf(texts[i])] : name));
  };
  const plain = (text) => new DOMParser().parseFromString(text, "text/html").body.textContent;
  const escape = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const pen = document.createElement("canvas").getContext("2d");
  const width = (text) => {
    pen.font = "12px " + getComputedStyle(document.body).fontFamily;
    return pen.measureText(text).width;
  };
  // A title in as many lines as it needs; its type is larger than that of names.
  const inLines = (text, room) => {
    const lines = [""];
    for (const word of text.split(" ")) {
      const longer = `${lines[lines.length - 1]} ${word}`.trim();
      if (width(longer) * 1.25 <= room || !lines[lines.length - 1]) lines[lines.length - 1] = longer;
      else lines.push(word);
    }
    return lines.map(escape).join("<br>");
  };
  // Where in pixels of the drawn plot a value lies.
  const scale = (axis, length, upward) => (value) => {
    const at = axis.type === "log" ? Math.log10(value) : value;
    const share = (at - axis.range[0]) / (axis.range[1] - axis.range[0]);
    return length * (upward ? 1 - share : share);
  };

  // Names beside the ends of lines: moved apart where they would overlap, left to the legend where there is no room.
  const endLabels = (place, traces) => {
    const lines = traces.filter((t) => t.type === "scatter" && t.mode.includes("lines") && t.name &&
      t.showlegend !== false && t.visible !== false && t.y.some((y) => y !== null) && t.name !== "Pareto front");
    const names = short(lines.map((t) => plain(t.name)), 30);
    const room = Math.max(0, ...names.map(width)) + 14;
    const plot = place.querySelector(".nsewdrag");
    if (!lines.length || !plot || place.clientWidth < 480 || room > 0.42 * place.clientWidth) return null;
    const height = Number(plot.getAttribute("height"));
    if (lines.length * 15 > height) return null;
    const y = scale(place.layout.yaxis, height, true);
    const spots = lines.map((t, i) => {
      const known = t.y.map((v, k) => [t.x[k], v]).filter(([, v]) => v !== null);
      return {name: names[i], colour: t.line.color, at: y(known[known.length - 1][1])};
    }).filter((s) => Number.isFinite(s.at)).sort((a, b) => a.at - b.at);
    spots.forEach((s, i) => { s.to = Math.max(8, s.at, i ? spots[i - 1].to + 15 : 0); });
    for (let i = spots.length - 1, most = height - 4; i >= 0; i--, most = spots[i + 1].to - 15) {
      spots[i].to = Math.min(spots[i].to, most);
    }
    return {room, notes: spots.map((s) => ({xref: "paper", yref: "paper", x: 1, y: 1 - s.to / height, xanchor: "left",
      yanchor: "middle", xshift: 6, showarrow: false, text: escape(s.name), font: {size: 12, color: s.colour}}))};
  };

  // Names beside points: the first of some places around the point that is free.
  const pointLabels = (place, traces) => {
    const points = traces.filter((t) => t.type === "scatter" && t.mode === "markers" && t.text && t.visible !== false);
    const plot = place.querySelector(".nsewdrag");
    if (!points.length || !plot || place.clientWidth < 480 || points.length > 40) return null;
    const [w, h] = ["width", "height"].map((side) => Number(plot.getAttribute(side)));
    const x = scale(place.layout.xaxis, w, false), y = scale(place.layout.yaxis, h, true);
    const taken = [];
    for (const t of points) {
      const [px, py] = [x(t.x[0]), y(t.y[0])];
      taken.push([px - 7, py - 7, px + 7, py + 7]);
    }
    const free = (box) => box[0] >= 0 && box[2] <= w && box[1] >= 0 && box[3] <= h &&
      taken.every((o) => box[2] <= o[0] || o[2] <= box[0] || box[3] <= o[1] || o[3] <= box[1]);
    const names = short(points.map((t) => plain(t.name)), 34), notes = [];
    for (const [i, t] of points.entries()) {
      const name = names[i], wide = width(name) + 6;
      const [px, py] = [x(t.x[0]), y(t.y[0])];
      let found = null;
      // Aslant first: straight beside or above a point run its error bars.
      for (const far of [12, 24, 40, 60, 84, 110]) {
        for (const [dx, dy] of [[1, -1], [-1, -1], [1, 1], [-1, 1], [0, -2], [0, 2], [1, 0], [-1, 0]]) {
          const cx = px + dx * (Math.min(far, 30) - 4 + wide / 2), cy = py + dy * far;
          const box = [cx - wide / 2, cy - 9, cx + wide / 2, cy + 9];
          if (!found && free(box)) found = {box, ax: cx - px, ay: cy - py, far};
        }
      }
      if (!found) return null;
      taken.push(found.box);
      const log = (axis, v) => (axis.type === "log" ? Math.log10(v) : v);
      const at = {x: log(place.layout.xaxis, t.x[0]), y: log(place.layout.yaxis, t.y[0]), text: escape(name),
        font: {size: 12, color: t.marker.color}, borderpad: 1};
      // A name far from its point is led there by a line.
      notes.push(found.far <= 24 ? {...at, showarrow: false, xshift: found.ax, yshift: -found.ay}
        : {...at, showarrow: true, ax: found.ax, ay: found.ay, arrowhead: 0, arrowwidth: 0.8, arrowcolor: t.marker.color,
          standoff: 6});
    }
    return {room: 16, notes};
  };

  const labelled = (place, figure, traces, base) => {
    const found = figure.labels === "end" ? endLabels(place, traces)
      : figure.labels === "point" ? pointLabels(place, traces) : null;
    place.toggleAttribute("data-labelled", Boolean(found));
    if (!found) return null;
    const layout = {...base, annotations: [...(figure.layout.annotations || []), ...found.notes],
      margin: {...template().layout.margin, ...(figure.layout.margin || {}), r: found.room}};
    // The ranges that the places were worked out for.
    for (const axis of ["xaxis", "yaxis"]) {
      layout[axis] = {...base[axis], range: [...place.layout[axis].range], autorange: false};
    }
    return show(place, traces, layout);
  };

  const draw = async (place) => {
    drawing += 1;
    try { await drawOnce(place); } finally {
      drawing -= 1;
      if (every && !drawing) settled();
    }
  };
  const drawOnce = async (place) => {
    const figure = charts[Number(place.dataset.chart)];
    drawn.add(place);
    place.dataset.drawn = "yes";
    const shown = labelsShown(place);
    const traces = figure.data.map((t) => ({...t, visible: !shown || t.meta === undefined || shown.has(t.meta)}));
    // Plotly writes into what it is given.
    place.dataset.height ||= place.style.height;
    const base = () => {
      const layout = {...JSON.parse(JSON.stringify(figure.layout)), template: template()};
      for (const [axis, room] of [["xaxis", place.clientWidth - 110], ["yaxis", place.clientHeight - 90]]) {
        const title = layout[axis] && layout[axis].title;
        if (title && title.text) title.text = inLines(plain(title.text), room);
        // Every further line below the plot makes it as much higher: Plotly would push the title up into the marks.
        const lines = title && title.text && axis === "xaxis" ? title.text.split("<br>").length - 1 : 0;
        if (axis === "xaxis") place.style.height = `${parseFloat(place.dataset.height) + 20 * lines}px`;
      }
      return layout;
    };
    await show(place, traces, base());
    await labelled(place, figure, traces, base());
    place.dataset.settled = "yes";
  };

  let wide = innerWidth, timer = 0;
  addEventListener("resize", () => {
    if (innerWidth === wide) return;
    wide = innerWidth;
    clearTimeout(timer);
    timer = setTimeout(() => drawn.forEach(draw), 250);
  });

  // ---------------------------------------------------------------- filters
  const facets = {dataset: "Data set", net: "Network", rule: "Rule", mode: "Mode", device: "Device", seed: "Seed"};
  const rows = $("tr[data-rule]");
  const chosen = Object.fromEntries(Object.keys(facets).map((key) => [key, new Set()]));
  let words = [];
  const values = (row, key) => row.dataset[key].split("\t");
  const fits = (row) => Object.entries(chosen).every(([key, set]) => !set.size || values(row, key).some((v) => set.has(v))) &&
    words.every((word) => (row.dataset.find + " " + row.textContent).toLowerCase().includes(word));
  let filtering = false;
  const labelsShown = (place) => {
    const section = place.closest("section[data-place]");
    if (!filtering || !section) return null;
    return new Set($("tr[data-label]", section).filter((row) => !row.hidden).map((row) => row.dataset.label));
  };
  const whole = (table) => {
    table.classList.remove("short");
    table.dataset.whole = "yes";
    const button = table.parentElement.nextElementSibling;
    if (button && button.matches("button.all")) button.remove();
  };
  const apply = () => {
    filtering = words.length > 0 || Object.values(chosen).some((set) => set.size);
    for (const row of rows) row.hidden = !fits(row);
    // Rows that fit must not stand behind a button.
    if (filtering) $("table.short").forEach(whole);
    let comparisons = 0, kept = 0;
    for (const section of $("section[data-place]")) {
      const own = $("tr[data-rule]", section);
      section.hidden = own.length > 0 && own.every((row) => row.hidden);
      comparisons += section.hidden ? 0 : 1;
      kept += own.filter((row) => !row.hidden).length;
      for (const line of $(`tr[data-section="${section.id}"]`)) line.hidden = section.hidden;
    }
    status.textContent = filtering ? `${kept} rows in ${comparisons} comparisons` : "";
    status.title = "Means are over all seeds of a row; choosing seeds narrows rows and lists of runs.";
    for (const place of drawn) if (place.closest("section") && !place.closest("section").hidden) draw(place);
    keep();
  };
  // What a tab keeps of this page: the filter, and of a page that loads itself again everything that was chosen on it.
  const key = "locallearn " + location.pathname;
  let before = ["", [], null];
  try { before = JSON.parse(sessionStorage.getItem(key)) || before; } catch { /* a browser that keeps nothing for files */ }
  const keep = () => {
    const kept = [search.value, Object.entries(chosen).map(([k, s]) => [k, [...s]]), ...(every ? [state()] : [])];
    try { sessionStorage.setItem(key, JSON.stringify(kept)); } catch { /* the same */ }
  };
  const search = make("input", {type: "search", placeholder: "Search rules, settings, runs"});
  search.setAttribute("aria-label", "Search rules, settings and runs");
  const status = make("output");
  const menus = [];
  const filter = document.getElementById("filter");
  if (filter && rows.length > 1) {
    search.value = before[0];
    words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    search.addEventListener("input", () => { words = search.value.toLowerCase().split(/\s+/).filter(Boolean); apply(); });
    filter.append(search);
    for (const [key, title] of Object.entries(facets)) {
      const counts = new Map();
      for (const row of rows) for (const v of values(row, key)) counts.set(v, (counts.get(v) || 0) + 1);
      if (counts.size < 2) continue;
      for (const [k, set] of before[1]) if (k === key) set.filter((v) => counts.has(v)).forEach((v) => chosen[key].add(v));
      const summary = make("summary", {textContent: title});
      const mark = () => {
        summary.textContent = chosen[key].size ? `${title}: ${chosen[key].size}` : title;
        summary.classList.toggle("on", chosen[key].size > 0);
      };
      const sorted = [...counts.keys()].sort((a, b) => a.localeCompare(b, "en", {numeric: true}));
      const menu = make("div", {className: "menu"}, ...sorted.map((value) => {
        const box = make("input", {type: "checkbox", checked: chosen[key].has(value)});
        box.addEventListener("change", () => { chosen[key][box.checked ? "add" : "delete"](value); mark(); apply(); });
        return make("label", {}, box, ` ${value}`);
      }));
      mark();
      const details = make("details", {}, summary, menu);
      details.addEventListener("toggle", () => { if (details.open) menus.forEach((m) => { if (m !== details) m.open = false; }); });
      menus.push(details);
      filter.append(details);
    }
    const reset = make("button", {type: "button", textContent: "Show all"});
    reset.addEventListener("click", () => {
      search.value = "";
      words = [];
      Object.values(chosen).forEach((set) => set.clear());
      menus.forEach((menu) => { menu.querySelectorAll("input").forEach((box) => { box.checked = false; }); });
      menus.forEach((menu) => {
        const summary = menu.querySelector("summary");
        summary.classList.remove("on");
        summary.textContent = summary.textContent.replace(/: \d+$/, "");
      });
      apply();
    });
    filter.append(reset, status);
    filter.hidden = false;
    document.addEventListener("click", (event) => { menus.forEach((m) => { if (!m.contains(event.target)) m.open = false; }); });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") menus.forEach((m) => { if (m.open) { m.open = false; m.querySelector("summary").focus(); } });
    });
  }

  // ---------------------------------------------------------------- tables
  // Of a text that is a number as a whole: with a unit, and what it is read with (± 0.1, of 3, [0.1, 0.3]); no list, no date.
  const number = (text) => {
    const found = text.match(/^≥?\s*([-+−]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d+)?(?:e[-+]?\d+)?)\s*(?:[^\s\d(]{1,8})?\s*(?:(?:[±([]|of \d|to ).*)?$/i);
    return found ? Number(found[1].replace(/,/g, "").replace("−", "-")) : NaN;
  };
  // What a cell says first: what stands below it in small type is of another kind.
  const lead = (cell) => [...cell.childNodes].filter((n) => n.nodeName !== "SMALL").map((n) => n.textContent).join("").trim();
  // Numbers begin with the largest, texts and dates with the first.
  const sort = (table, column, wanted) => {
    const body = table.tBodies[0], heads = table.tHead.rows[0].cells;
    const lines = [...body.rows].map((row) => {
      const cell = row.cells[column], first = cell ? lead(cell) : "";
      return [row, cell ? cell.textContent.trim() : "", number(first), !/^[–-]?$/.test(first)];
    });
    const numbers = lines.filter(([, , n]) => !Number.isNaN(n)).length;
    const numeric = numbers > 0 && numbers >= lines.filter(([, , , known]) => known).length / 2;
    const up = wanted === undefined ? !numeric : wanted, sign = up ? 1 : -1;
    lines.sort(([, a, m], [, b, n]) => {
      if (!numeric) return sign * a.localeCompare(b, "en", {numeric: true});
      if (Number.isNaN(m) || Number.isNaN(n)) return Number.isNaN(m) - Number.isNaN(n);
      return sign * (m - n);
    });
    body.append(...lines.map(([row]) => row));
    for (const other of heads) other.removeAttribute("aria-sort");
    heads[column].setAttribute("aria-sort", up ? "ascending" : "descending");
  };
  const heading = (th) => [...th.querySelector("button").childNodes].map((n) => n.textContent).join(", ");
  // A heading ends with a unit, which a further run may change.
  const nameOf = (th) => th.dataset.name || heading(th);
  const boxesOf = new Map();
  const prepare = (table) => {
    if (table.dataset.ready || !table.tHead) return;
    table.dataset.ready = "yes";
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((th, column) => {
      const button = make("button", {className: "sort", type: "button"}, ...th.childNodes);
      button.addEventListener("click", () => sort(table, column,
        {ascending: false, descending: true}[th.getAttribute("aria-sort")]));
      th.append(button);
    });
    if (table.classList.contains("cards")) {
      const titles = heads.map(heading);
      for (const row of table.tBodies[0].rows) for (const cell of row.cells) {
        if (cell.tagName === "TD") cell.dataset.h = titles[cell.cellIndex];
        cell.classList.toggle("none", cell.textContent === "–");
      }
    }
    const button = table.parentElement.nextElementSibling;
    if (table.dataset.columns !== undefined && heads.some((th) => th.classList.contains("off"))) {
      const labels = heads.slice(2).map((th, i) => {
        const box = make("input", {type: "checkbox", name: nameOf(th), defaultChecked: !th.classList.contains("off")});
        box.addEventListener("change", () => {
          for (const row of table.rows) row.cells[i + 2].classList.toggle("off", !box.checked);
        });
        return make("label", {}, box, " " + heading(th));
      });
      boxesOf.set(table, labels.map((label) => label.firstChild));
      (button && button.matches("button.all") ? button : table.parentElement).after(make("details", {}, make("summary", {textContent: "Choose columns"}),
        make("div", {className: "choices"}, ...labels)));
    }
  };
  for (const button of $("button.all")) button.addEventListener("click", () => whole(button.previousElementSibling.firstChild));
  const opened = (details) => $("table", details).forEach(prepare);
  $("details").forEach((d) => d.addEventListener("toggle", () => { if (d.open) opened(d); }));

  // ---------------------------------------------------------------- choices of a run
  const choosers = $("select.choose");
  for (const choose of choosers) {
    const show = () => {
      for (const place of choose.closest(".chooser").querySelectorAll("[data-choice]")) {
        place.hidden = place.dataset.choice !== choose.value;
      }
    };
    choose.addEventListener("change", show);
    show();
  }
  if (words.length || Object.values(chosen).some((set) => set.size)) apply();

  // ---------------------------------------------------------------- a page that is written again and again
  // Things by what stands over and in them, not by number: runs that came in meanwhile have moved them. What has the same
  // name as something before it is counted.
  const named = (elements, own) => {
    const found = new Map(), text = (from, selector) => ((from && from.querySelector(selector)) || {textContent: ""}).textContent;
    for (const element of elements) {
      const name = [text(element.closest("section"), "h2"), text(element.closest("figure"), "h4"), own(element)].join("\n");
      let free = name;
      for (let n = 2; found.has(free); n++) free = `${name}\n${n}`;
      found.set(free, element);
    }
    return found;
  };
  const tablesByName = () => named($("table"), (table) => table.parentElement.getAttribute("aria-label"));
  // Menus are no details: none is open when the page loads itself again.
  const detailsByName = () => named($("details").filter((d) => !d.closest("#filter") && !d.querySelector(":scope > .choices")),
    (details) => details.dataset.name || details.querySelector("summary").textContent);
  const choosersByName = () => named(choosers, () => "");
  const marks = "header.page, nav, section, figure, h2, h3, details, .scroll, footer";
  const marksByName = () => named($(marks), (mark) => [mark.tagName, mark.matches("h2, h3") ? mark.textContent
    : mark.dataset.name || mark.getAttribute("aria-label") || (mark.querySelector(":scope > summary") || mark.firstChild).textContent]);
  // What stands highest in the window, and where; nothing for a reader at the top, who is to see what is new there.
  const standing = () => {
    for (let y = 0; scrollY && y < innerHeight; y += 12) {
      const hit = document.elementFromPoint(innerWidth / 4, y), mark = hit && !hit.closest("#filter") && hit.closest(marks);
      if (mark) return [[...marksByName()].find(([, one]) => one === mark)[0], mark.getBoundingClientRect().top];
    }
    return [];
  };
  const state = () => {
    const found = {sorts: [], columns: [], whole: [], open: [], runs: [], at: standing()};
    for (const [name, table] of tablesByName()) {
      const th = table.querySelector("th[aria-sort]");
      if (th) found.sorts.push([name, nameOf(th), th.getAttribute("aria-sort") === "ascending"]);
      const changed = (boxesOf.get(table) || []).filter((box) => box.checked !== box.defaultChecked);
      for (const box of changed) found.columns.push([name, box.name, box.checked]);
      if (table.dataset.whole) found.whole.push(name);
    }
    for (const [name, details] of detailsByName()) if (details.open) found.open.push(name);
    for (const [name, choose] of choosersByName()) found.runs.push([name, choose.selectedOptions[0].dataset.name]);
    return found;
  };
  // What is no longer there is passed over.
  const restore = (kept) => {
    const tables = tablesByName(), details = detailsByName(), byName = choosersByName();
    for (const [name, title, up] of kept.sorts) {
      const table = tables.get(name);
      if (table) prepare(table);
      const column = table ? [...table.tHead.rows[0].cells].findIndex((th) => nameOf(th) === title) : -1;
      if (column >= 0) sort(table, column, up);
    }
    for (const [name, title, on] of kept.columns) {
      const table = tables.get(name);
      if (table) prepare(table);
      const box = (boxesOf.get(table) || []).find((b) => b.name === title);
      if (box && box.checked !== on) box.click();
    }
    for (const name of kept.whole) if (tables.has(name)) whole(tables.get(name));
    for (const name of kept.open) if (details.has(name)) details.get(name).open = true;
    for (const [name, run] of kept.runs) {
      const choose = byName.get(name), option = choose && [...choose.options].find((o) => o.dataset.name === run);
      if (option && !option.selected) {
        option.selected = true;
        choose.dispatchEvent(new Event("change"));
      }
    }
  };
  let at = null, due = 0;
  const stand = () => {
    const mark = at && marksByName().get(at[0]);
    // An address with a place on the page would lead a reader away from the top.
    if (at && !at.length) scrollTo(0, 0);
    if (mark) scrollBy(0, mark.getBoundingClientRect().top - at[1]);
  };
  const held = make("output", {className: "held", hidden: true,
    textContent: "New runs wait while a menu is open or the search is being typed in."});
  // Not every browser tells that a list of choices is open.
  const busy = () => menus.some((menu) => menu.open) || $("details[open] > .choices").length > 0 ||
    document.activeElement === search || (CSS.supports("selector(:open)") && $("select:open").length > 0);
  // Whether its file has changed a page from the disk cannot see: browsers let it read no file, not even its own, and its
  // policy has it ask for nothing. So it loads itself whether there is something new or not.
  const again = () => {
    clearTimeout(due);
    due = 0;
    held.hidden = !document.hidden && !busy();
    if (held.hidden && !drawing) location.reload();
    else due = setTimeout(again, 500);
  };
  // Counted from the last chart that was drawn: a slow page is not loaded again before it has been seen.
  const count = () => {
    clearTimeout(due);
    due = setTimeout(again, 1000 * every);
  };
  const settled = () => {
    // Names that stand at lines instead of below the chart have moved what is below; then the reader may go anywhere.
    stand();
    at = null;
    count();
  };
  if (every) {
    document.body.append(held);
    history.scrollRestoration = "manual";
    if (before[2]) {
      restore(before[2]);
      at = before[2].at;
      stand();
    }
    for (const moved of ["wheel", "touchstart", "pointerdown", "keydown"]) addEventListener(moved, () => { at = null; });
    addEventListener("pagehide", keep);
    document.addEventListener("visibilitychange", () => { if (!held.hidden) again(); });
  }

  // ---------------------------------------------------------------- everything that can wait
  // Plotly's script is kept compressed and read after the page is on the screen.
  const library = async () => {
    const kept = document.getElementById("library");
    const bytes = Uint8Array.from(atob(kept.textContent), (sign) => sign.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = make("script", {textContent: await new Response(stream).text()});
    kept.remove();
    document.head.append(script);
  };
  const places = $("[data-chart]");
  // Charts are drawn when they come near the window: a page of hundreds opens at once.
  const watcher = new IntersectionObserver((seen) => {
    for (const entry of seen) if (entry.isIntersecting) { watcher.unobserve(entry.target); draw(entry.target); }
  }, {rootMargin: "900px"});
  const lines = new IntersectionObserver((seen) => {
    for (const entry of seen) if (entry.isIntersecting) { lines.unobserve(entry.target); prepare(entry.target); }
  }, {rootMargin: "900px"});
  requestAnimationFrame(() => setTimeout(async () => {
    const tables = $("table").filter((table) => !table.closest("details"));
    // In a narrow window the cells of a table carry its headings, near or far.
    tables.forEach((table) => (innerWidth <= 640 && table.matches(".cards") ? prepare(table) : lines.observe(table)));
    if (every) stand();
    try {
      await library();
      places.forEach((place) => watcher.observe(place));
    } finally { if (every) count(); }
  }));
  addEventListener("beforeprint", () => places.forEach((place) => {
    if (window.Plotly && place.offsetParent && !drawn.has(place)) draw(place);
  }));
  dark.addEventListener("change", () => drawn.forEach(draw));
})();
