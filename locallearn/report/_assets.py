"""The page's style sheet and the script that draws its charts."""

STYLE = """
:root{--bg:#fff;--fg:#1b1f24;--muted:#5b6570;--line:#dde1e6;--soft:#f5f7f9;--accent:#0062a3;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e7eaee;--muted:#9aa5b1;--line:#30363d;--soft:#1c2127;
--accent:#6cb8f0}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header.page,footer{max-width:1240px;margin:0 auto;padding:0 20px}
header.page{padding-top:36px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 6px;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:1.3rem;margin:48px 0 4px;padding-top:14px;border-top:1px solid var(--line);overflow-wrap:anywhere}
h3{font-size:1.02rem;margin:32px 0 8px}
h4{font-size:.92rem;margin:0 0 2px;overflow-wrap:anywhere}
p{margin:4px 0 10px;max-width:78ch;overflow-wrap:anywhere}
.muted,.note{color:var(--muted);font-size:.88rem}
.lead{color:var(--muted)}
a{color:var(--accent)}
.skip{position:absolute;left:-999px}.skip:focus{left:12px;top:12px;background:var(--bg);padding:8px 12px;z-index:9}
nav ul{list-style:none;padding:0;margin:12px 0 0;display:flex;flex-wrap:wrap;gap:6px 16px;font-size:.92rem}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.scroll{overflow-x:auto;margin:10px 0 8px;max-height:70vh}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;text-align:right;vertical-align:top;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child,.left{text-align:left}
td.wrap{white-space:normal;min-width:22ch;max-width:80ch;overflow-wrap:anywhere}
thead th{position:sticky;top:0;background:var(--bg);color:var(--muted);font-weight:600;font-size:.8rem;
vertical-align:bottom;line-height:1.3;white-space:normal;min-width:9ch;border-bottom:1.5px solid var(--fg);z-index:1}
tbody th{font-weight:600;position:sticky;left:0;background:var(--bg);max-width:46vw;white-space:normal;
overflow-wrap:anywhere;min-width:min(21ch,40vw)}
thead th:first-child{left:0;z-index:2}
small{display:block;color:var(--muted);font-weight:400;font-size:.78rem}
td .sd{color:var(--muted)}
.dot{display:inline-block;width:.68em;height:.68em;border-radius:50%;margin-right:.5em}
.badge{font-size:.76rem;font-weight:600;color:var(--muted);border:1px solid var(--line);border-radius:99px;
padding:2px 10px;margin-left:8px;vertical-align:middle;white-space:nowrap}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,380px),1fr));gap:26px 32px;margin-top:14px}
.grid>figure:only-child{max-width:820px}
figure{margin:0;min-width:0}
.chart{width:100%}
.picture{display:block;width:100%;max-width:820px;height:auto;image-rendering:pixelated}
.chart .modebar-container{opacity:0;transition:opacity .15s}.chart:hover .modebar-container{opacity:1}
details{margin:6px 0}
summary{cursor:pointer;color:var(--muted);font-size:.86rem;width:fit-content}
summary:hover{color:var(--fg)}
pre{background:var(--soft);padding:12px 14px;border-radius:6px;overflow:auto;max-height:60vh;font-size:.8rem;
line-height:1.45}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
ul.plain{padding-left:1.1em;margin:6px 0;font-size:.9rem}
footer{padding-top:40px;padding-bottom:48px}
@media (max-width:560px){main,header.page,footer{padding-left:14px;padding-right:14px}th,td{padding:6px 8px}}
@media print{.scroll{overflow:visible;max-height:none}thead th,tbody th{position:static}}
"""

SCRIPT = """
"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const drawn = [];
  // Colours come from the style sheet, so that the charts follow the page between light and dark.
  const template = () => {
    const css = getComputedStyle(document.documentElement);
    const colour = (name) => css.getPropertyValue(name).trim();
    const axis = {gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"),
      automargin: true, title: {standoff: 10}};
    return {layout: {
      font: {family: getComputedStyle(document.body).fontFamily, size: 12.5, color: colour("--fg")},
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis,
      hoverlabel: {bgcolor: colour("--bg"), bordercolor: colour("--line"), font: {color: colour("--fg")},
        align: "left"},
      legend: {orientation: "h", x: 0, y: -0.24, yanchor: "top"}, margin: {l: 12, r: 16, t: 10, b: 12},
      modebar: {bgcolor: "rgba(0,0,0,0)", color: colour("--muted"), activecolor: colour("--fg")},
      hovermode: "closest"}};
  };
  const draw = (place) => {
    if (place.dataset.drawn) return;
    place.dataset.drawn = "yes";
    const figure = charts[Number(place.dataset.chart)];
    drawn.push(place);
    // The wanted buttons by name: a later version's new ones (this one's uploads the chart) stay away.
    Plotly.newPlot(place, figure.data, {...figure.layout, template: template()}, {responsive: true, displaylogo: false,
      showSendToCloud: false, plotlyServerURL: "", showLink: false, showEditInChartStudio: false,
      modeBarButtons: [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]]});
  };
  const places = [...document.querySelectorAll("[data-chart]")];
  // Charts are drawn when they come near the window: a page of hundreds opens at once.
  const watcher = new IntersectionObserver((seen) => {
    for (const entry of seen) if (entry.isIntersecting) { watcher.unobserve(entry.target); draw(entry.target); }
  }, {rootMargin: "900px"});
  places.forEach((place) => watcher.observe(place));
  addEventListener("beforeprint", () => places.forEach(draw));
  dark.addEventListener("change", () => drawn.forEach((place) => Plotly.relayout(place, {template: template()})));
})();
"""
