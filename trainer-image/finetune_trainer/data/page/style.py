"""The page's style: system fonts, light and dark, and paper."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2330; --soft: #5a6675; --line: #dfe4ea; --track: #edf0f4;
  --hue1: #2f6fb7; --hue2: #1f8a70; --hue3: #b4651d; --error: #b3261e; --warning: #8a5a00; --good: #1d7048; }
@media (prefers-color-scheme: dark) { :root {
  --page: #12161c; --card: #1a2028; --ink: #e6eaf0; --soft: #a0acbb; --line: #303945; --track: #28303a;
  --hue1: #6ea8e8; --hue2: #57c2a5; --hue3: #e3a15f; --error: #ff8f85; --warning: #f0c062; --good: #6fce9f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, header, footer { max-width: 68rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 2.5rem; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 0 0 .6rem; font-size: 1.2rem; }
p { margin: 0 0 .6rem; }
.kind { color: var(--soft); margin: 0; }
.lead { font-size: 1.15rem; max-width: 52rem; margin: 1rem 0 .4rem; }
.note, footer { color: var(--soft); font-size: .9rem; }
.badge { display: inline-block; border: 1px solid currentColor; border-radius: 1rem; padding: .05rem .7rem;
  font-size: .9rem; font-weight: 600; margin-top: .8rem; }
.error { color: var(--error); } .warning { color: var(--warning); } .good { color: var(--good); }
section, .findings { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: 1.1rem 1.3rem; margin: 1rem 0; }
.findings { list-style: none; padding: .3rem 1.3rem; }
.findings li { padding: .6rem 0; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
.findings li:first-child { border-top: 0; }
.findings b { margin-right: .5rem; }
code, .sample { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .85rem;
  overflow-wrap: anywhere; }
.sample { white-space: pre-wrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 0 0 .8rem; }
caption { text-align: left; color: var(--soft); font-size: .9rem; padding-bottom: .3rem; }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; border-top: 1px solid var(--line); vertical-align: top;
  font-weight: normal; }
thead th { border-top: 0; color: var(--soft); font-size: .85rem; }
tbody th { overflow-wrap: anywhere; min-width: 8rem; }
td { overflow-wrap: break-word; }
td:last-child:has(.bar) { width: 45%; } td:has(.bar) ~ td:last-child:has(.bar) { width: auto; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; width: 7.5rem; }
.bar { display: block; width: 100%; min-width: 6rem; height: .7rem; margin-top: .45rem; border-radius: .2rem; }
.bar .track { fill: var(--track); }
.hue1 .fill { fill: var(--hue1); } .hue2 .fill { fill: var(--hue2); } .hue3 .fill { fill: var(--hue3); }
.plot { display: block; width: 100%; height: auto; margin: .3rem 0 .8rem; }
.plot .column { fill: var(--hue1); } .plot .limit { stroke: var(--error); stroke-dasharray: 4 3; }
.plot .axis { stroke: var(--line); } .plot text { fill: var(--soft); font-size: 12px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem; margin: 1rem 0; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1.1rem; }
.tiles dt, .facts dt { color: var(--soft); font-size: .9rem; }
.tiles dd { margin: 0; } .tiles strong { display: block; font-size: 1.6rem; line-height: 1.3; }
.tiles span { color: var(--soft); font-size: .85rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .6rem 1.5rem;
  margin: 0 0 .8rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
footer { padding-bottom: 2.5rem; }
li { overflow-wrap: anywhere; }
@media print { :root { color-scheme: light;
    --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --track: #eee;
    --hue1: #2f6fb7; --hue2: #1f8a70; --hue3: #b4651d; --error: #b3261e; --warning: #8a5a00; --good: #1d7048; }
  :root, body { font-size: 12px; } .scroll { overflow: visible; } .number { width: auto; }
  .bar { min-width: 3rem; } main, header, footer { max-width: none; padding-left: 0; padding-right: 0; }
  section { padding: .8rem 1rem; } tr, .tiles div, .findings li { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .bar rect, .plot rect { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
