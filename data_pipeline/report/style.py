"""How the page looks: one column on a phone, light or dark as the reader's system is."""

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1b2230; --soft: #667085; --line: #e1e5eb;
  --keep: #2f7df6; --keep-rgb: 47 125 246; --drop: #e5534b; --other: #b9c1cd; --warn: #b7791f; --outside: #e5534b14; }
@media (prefers-color-scheme: dark) { :root { --page: #10141b; --card: #181e28; --ink: #e6eaf1; --soft: #93a0b4;
  --line: #2a3342; --keep: #5b9bff; --keep-rgb: 91 155 255; --drop: #f0736b; --other: #4a5568; --warn: #e0b050;
  --outside: #f0736b1c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "DejaVu Sans", sans-serif; font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%; }
main { max-width: 1080px; margin: 0 auto; padding: 0 16px 64px; }
header { max-width: 1080px; margin: 0 auto; padding: 32px 16px 8px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 20px; margin: 44px 0 4px; letter-spacing: -.01em; scroll-margin-top: 52px; }
h3 { font-size: 16px; margin: 0; }
h4 { font-size: 13px; font-weight: 600; color: var(--soft); margin: 14px 0 6px; }
p { margin: 4px 0 12px; }
.soft, small { color: var(--soft); }
code { font-size: .92em; overflow-wrap: anywhere; }
nav { position: sticky; top: 0; z-index: 1; background: var(--page); border-bottom: 1px solid var(--line); }
nav div { max-width: 1080px; margin: 0 auto; padding: 8px 12px; display: flex; gap: 4px; overflow-x: auto;
  scrollbar-width: none; }
nav a { color: var(--soft); text-decoration: none; padding: 4px 10px; border-radius: 99px; white-space: nowrap;
  font-size: 14px; }
nav a:hover { background: var(--line); color: var(--ink); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 10px; margin: 18px 0; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.tile { padding: 12px 16px; }
.tile b { display: block; font-size: 24px; line-height: 1.25; }
.tile.good b { color: var(--keep); }
.tile.bad b { color: var(--drop); }
.card { padding: 14px 16px; margin: 12px 0; }
.steps { padding: 6px 16px; }
.step { padding: 9px 0; border-bottom: 1px solid var(--line); }
.step:last-child { border: 0; }
.step .line { display: flex; flex-wrap: wrap; gap: 0 14px; align-items: baseline; }
.step .name { font-weight: 600; color: inherit; text-decoration: none; }
.step .left { margin-left: auto; }
.gone { color: var(--drop); }
.warn { color: var(--warn); }
.bar { display: flex; height: 10px; margin: 5px 0 1px; border-radius: 5px; overflow: hidden; background: var(--line);
  }
.bar i { display: block; }
.bar .keep, .key.keep { background: var(--keep); }
.bar .drop, .key.drop { background: var(--drop); }
.bar .other, .key.other { background: var(--other); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin: 0 5px 0 10px; }
.key:first-child { margin-left: 0; }
.chart { display: block; width: 100%; max-width: 560px; height: auto; margin: 8px 0 0; font-size: 11px; }
.chart .keep { fill: var(--keep); }
.chart .drop { fill: var(--drop); }
.chart .other { fill: var(--other); }
.chart .outside { fill: var(--outside); }
.chart text { fill: var(--soft); }
.chart text.mark { fill: var(--drop); font-weight: 600; }
.chart line.mark { stroke: var(--drop); stroke-width: 1.5; stroke-dasharray: 3 2; }
.notes { margin-left: 10px; }
.chart .base { stroke: var(--line); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 12px; margin: 12px 0; }
.charts .card { margin: 0; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(168px, 30%), 1fr)); gap: 8px; }
figure { margin: 0; min-width: 0; }
figure .picture { display: flex; aspect-ratio: 16 / 10; border-radius: 7px; overflow: hidden; background: #0b0e13;
  align-items: center; justify-content: center; color: #93a0b4; font-size: 12px; text-align: center; }
figure img { width: 100%; height: 100%; object-fit: contain; }
figcaption { font-size: 12px; line-height: 1.35; padding: 3px 1px; }
figcaption b { display: block; }
figcaption span { display: block; color: var(--soft); overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
  }
figure.miss .picture { outline: 2px solid var(--drop); outline-offset: -2px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 12px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 6px; padding: 10px; margin: 0; }
.pair p { grid-column: 1 / 3; margin: 0 0 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 5px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, .text { text-align: left; }
td.wrap { white-space: normal; overflow-wrap: anywhere; min-width: 180px; }
tr:last-child td { border-bottom: 0; }
td.heat { background: rgb(var(--keep-rgb) / var(--heat)); }
td .bar { min-width: 90px; margin: 0; }
details > summary { cursor: pointer; color: var(--soft); padding: 4px 0; font-size: 13px; font-weight: 600; }
@media print { nav { display: none; } .card, .tile, figure { break-inside: avoid; } }
"""
