"""The looks of report.html: light and dark, on screens of any width and on paper."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b2733; --soft: #5b6875; --paper: #f5f7f9; --card: #fff; --line: #dde3e9;
  --pass: #1d7f4e; --pass-back: #e4f4ec; --fail: #c01526; --fail-back: #fdeaec; --accent: #2b6cb0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e9ef; --soft: #9aa7b4; --paper: #12171c; --card: #1a2128;
  --line: #2e3843; --pass: #5fd39a; --pass-back: #143325; --fail: #ff7b86; --fail-back: #3d181d; --accent: #79b3f0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 0; display: flex; gap: 12px; align-items: center; flex-wrap: wrap; }
h3 { font-size: 15px; margin: 24px 0 8px; }
p { margin: 6px 0; }
.sub, figcaption, .note { color: var(--soft); }
.sub { overflow-wrap: anywhere; }
.banner { margin: 22px 0; padding: 16px 20px; border-radius: 10px; border-left: 6px solid; }
.banner strong { font-size: 18px; margin-right: 10px; letter-spacing: .02em; }
.banner ul { margin: 10px 0 0; padding-left: 20px; }
.banner li { margin: 4px 0; overflow-wrap: anywhere; }
.pass { color: var(--pass); } .fail { color: var(--fail); }
.banner.pass { background: var(--pass-back); border-color: var(--pass); }
.banner.fail { background: var(--fail-back); border-color: var(--fail); }
.banner .note { color: inherit; opacity: .85; display: block; font-size: 13px; }
.badge { font-size: 12px; font-weight: 700; padding: 2px 10px; border-radius: 99px; letter-spacing: .04em; }
.badge.pass { background: var(--pass-back); } .badge.fail { background: var(--fail-back); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px;
  margin: 20px 0; }
.faults { margin: 10px 0 0; padding-left: 20px; color: var(--fail); font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
tr.gate td { color: var(--soft); font-style: italic; border-bottom: 0; }
td.fail { font-weight: 700; background: var(--fail-back); }
td.ok { color: var(--pass); font-weight: 700; }
figure { margin: 14px 0 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { font-size: 13px; margin-top: 4px; }
details { margin-top: 16px; border-top: 1px solid var(--line); padding-top: 12px; }
summary { cursor: pointer; font-weight: 600; color: var(--accent); }
.blocks { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(420px, 100%), 1fr)); gap: 22px 28px;
  margin-top: 14px; }
.blocks figure { margin: 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; }
.pair img { width: 100%; display: block; border-radius: 3px; margin-top: 4px; }
.pair span { font-size: 12px; color: var(--soft); overflow-wrap: anywhere; }
.given { display: flex; gap: 18px; align-items: flex-start; margin-top: 10px; flex-wrap: wrap; }
.given img { width: 150px; border-radius: 3px; }
.given div { flex: 1 1 320px; }
.swatch { color: #e11d2e; font-weight: 700; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 8px 0 0; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
code { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
a { color: var(--accent); }
@media (max-width: 640px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; } }
@media print { body { background: none; } .card { break-inside: avoid-page; border: 0; padding: 0; } }
"""
