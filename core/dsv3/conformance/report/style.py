"""Style and script of the HTML report. Both stand in the page itself, and its content security policy names their hashes."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark; --bg: #fbfbfc; --card: #fff; --text: #1c2128; --soft: #57606a; --line: #d8dee4;
  --head: #f3f5f7; --link: #0b5cad; --ok: #166b40; --warn: #8a5a00; --bad: #c11f2e; --waived: #7a3fb5;
  --none: #59626b; --composite: #0b5cad; --ok-bg: #e3f4ea; --warn-bg: #fff3d6; --bad-bg: #fde8e9;
  --waived-bg: #f2e9fb; --none-bg: #eef0f2; --composite-bg: #e4f0fb;
}
@media(prefers-color-scheme:dark){
  :root {
    --bg: #0f1216; --card: #171b21; --text: #e4e8ec; --soft: #9aa5b1; --line: #2c333b; --head: #1e242b;
    --link: #79b8ff; --ok: #5bd08f; --warn: #f0b94d; --bad: #ff7b81; --waived: #c9a0f2; --none: #98a2ad;
    --composite: #79b8ff; --ok-bg: #12301f; --warn-bg: #362a0c; --bad-bg: #3a1619; --waived-bg: #2a1c3a;
    --none-bg: #222830; --composite-bg: #13283e;
  }
}
* { box-sizing: border-box }
html { scroll-padding-top: 1rem }
body {
  margin: 0; background: var(--bg); color: var(--text);
  font: 15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem 1.25rem 4rem }
h1 { font-size: 1.5rem; margin: 0 0 .25rem }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .75rem }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem }
p { margin: .25rem 0 .75rem }
a { color: var(--link) }
code, pre, .id { font-family: ui-monospace,"SF Mono",Menlo,Consolas,monospace; font-size: .86em }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: 1rem 0 0 }
.soft { color: var(--soft) }
.run {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.1rem; margin: 1rem 0;
}
.run h2 { margin: 0 0 .5rem }
.badge { display: inline-block; border-radius: 6px; padding: .3rem .7rem; font-weight: 600; overflow-wrap: anywhere }
.tiles { display: grid; grid-template-columns: repeat(auto-fit,minmax(96px,1fr)); gap: .6rem; margin: .9rem 0 .2rem }
.tiles div { background: var(--head); border-radius: 8px; padding: .45rem .7rem }
.tiles b { display: block; font-size: 1.3rem; line-height: 1.3 }
.tiles dt, .tiles dd { margin: 0 }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; background: var(--card) }
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .35rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top }
tbody tr:last-child>* { border-bottom: 0 }
thead th { background: var(--head); font-weight: 600; white-space: nowrap }
th[scope=row] { font-weight: 500 }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.ok { color: var(--ok) }
.warn { color: var(--warn) }
.bad { color: var(--bad) }
.waived { color: var(--waived) }
.none { color: var(--none) }
.chip { display: inline-block; border-radius: 5px; padding: 0 .5rem; white-space: nowrap; font-size: .92em }
.native, .passed { color: var(--ok); background: var(--ok-bg) }
.partial, .narrow { color: var(--warn); background: var(--warn-bg) }
.failed { color: var(--bad); background: var(--bad-bg) }
.chip.waived { color: var(--waived); background: var(--waived-bg) }
.composite { color: var(--composite); background: var(--composite-bg) }
.absent, .untested { color: var(--none); background: var(--none-bg) }
details>summary { cursor: pointer }
td details ul { margin: .35rem 0 .2rem; padding-left: 1.1rem; font-size: .9em; max-width: 46rem }
.matrix td { min-width: 9rem }
.matrix summary { list-style: none }
.matrix summary::-webkit-details-marker { display: none }
.why { color: var(--link); text-decoration: underline; font-size: .86em; margin-left: .2rem }
.legend {
  display: flex; flex-wrap: wrap; gap: .35rem 1.25rem; list-style: none; padding: 0; font-size: .92em;
  margin: .75rem 0;
}
.group {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: .5rem 0; overflow: hidden;
}
.group>summary { padding: .5rem .8rem; display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: baseline }
.group>summary::before { content: "+"; color: var(--soft); width: .7em }
.group[open]>summary::before { content: "-" }
.group .scroll { border: 0; border-top: 1px solid var(--line); border-radius: 0 }
.id { overflow-wrap: anywhere }
tr:target>*, .fail:target { background: var(--warn-bg) }
.fail {
  background: var(--card); border: 1px solid var(--line); border-left: 4px solid var(--bad); border-radius: 8px;
  padding: .7rem 1rem; margin: .75rem 0;
}
.fail h3 { margin: 0 0 .4rem; overflow-wrap: anywhere }
.fail dl, .facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0 }
.fail dt, .facts dt { color: var(--soft) }
.fail dd, .facts dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap }
.plot th, .plot td { padding: 0 .7rem; vertical-align: middle }
.plot thead th { padding: .3rem .7rem }
.plot th:first-child { min-width: max-content }
.plot svg { display: block; width: 100%; height: auto; min-width: 640px }
.plot td:nth-child(2) { width: 100% }
.cases th.id { min-width: 19rem }
.cases td:last-child { min-width: 15rem }
.plot th:first-child { position: sticky; left: 0; background: var(--card); z-index: 1 }
.plot thead th:first-child { background: var(--head) }
svg text { fill: var(--soft); font-size: 11px; font-weight: 400 }
svg .grid { stroke: var(--line); fill: none }
svg .limit { stroke: var(--soft); fill: none; stroke-dasharray: 3 3 }
svg .zone-warn { fill: var(--warn-bg) }
svg .zone-bad { fill: var(--bad-bg) }
svg circle.ok { fill: var(--ok); fill-opacity: .75 }
svg circle.warn { fill: none; stroke: var(--warn); stroke-width: 2 }
svg path.waived { fill: var(--waived) }
svg path.bad { stroke: var(--bad); stroke-width: 2.2; fill: none }
.filter { display: flex; flex-wrap: wrap; gap: .6rem; margin: .5rem 0 }
.filter input, .filter select {
  font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .3rem .5rem;
}
.filter input { flex: 1 1 14rem; min-width: 0 }
[hidden] { display: none!important }
@media(max-width:640px){
  main { padding: 1rem .75rem 3rem }
  th, td { padding: .3rem .5rem }
  .fail dl, .facts { grid-template-columns: 1fr; gap: 0 }
  .fail dt, .facts dt { margin-top: .35rem }
  .matrix td { min-width: 7rem }
  .cases th.id { min-width: 13rem }
  .plot tr { display: grid; grid-template-columns: 1fr auto }
  .plot thead th:nth-child(2), .plot td:nth-child(2) { grid-column: 1/-1; order: 3 }
  .plot tbody th, .plot tbody td:last-child { border-bottom: 0 }
  .plot svg { min-width: 0 }
  svg text { font-size: 17px }
  svg circle { r: 4px }
}
@media print{
  .filter, nav { display: none }
}
"""

# The page is whole without it: it only hides rows. Groups that hold a match are opened while a filter is set.
SCRIPT = """
(function () {
  "use strict";
  var form = document.getElementById("filter");
  if (!form) return;
  var text = document.getElementById("filter-text"), status = document.getElementById("filter-status");
  var count = document.getElementById("filter-count"), groups = document.querySelectorAll(".group"), timer = 0;
  function apply() {
    var words = text.value.toLowerCase().split(/\\s+/).filter(Boolean), wanted = status.value, shown = 0;
    groups.forEach(function (group) {
      var here = 0;
      group.querySelectorAll("tbody tr").forEach(function (row) {
        var content = row.textContent.toLowerCase();
        var match = (!wanted || row.className.split(" ").indexOf("is-" + wanted) >= 0) &&
          words.every(function (word) { return content.indexOf(word) >= 0; });
        row.hidden = !match;
        if (match) here += 1;
      });
      var set = words.length > 0 || wanted !== "";
      group.hidden = here === 0;
      if (set) group.open = here > 0;
      shown += here;
    });
    count.textContent = shown + " shown";
  }
  function later() { clearTimeout(timer); timer = setTimeout(apply, 150); }
  text.addEventListener("input", later);
  status.addEventListener("change", apply);
  form.addEventListener("submit", function (event) { event.preventDefault(); });
  form.hidden = false;
}());
"""
