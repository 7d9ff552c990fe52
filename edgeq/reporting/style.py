"""The style sheet of the page: light and dark, from one column on a phone to two on a desk."""

THEMES = {
    "light": {
        "paper": "#ffffff",
        "panel": "#f5f6f8",
        "ink": "#1b2028",
        "muted": "#525c69",
        "line": "#d3d8df",
        "s0": "#0a5fbf",
        "s1": "#b3470a",
        "s2": "#0f766e",
        "s3": "#9c27b0",
        "s4": "#6b5d00",
        "s5": "#4b5563",
    },
    "dark": {
        "paper": "#12161c",
        "panel": "#1b2129",
        "ink": "#e7ebf0",
        "muted": "#a9b3bf",
        "line": "#3a434f",
        "s0": "#6fb4ff",
        "s1": "#ffa45c",
        "s2": "#4fd1b8",
        "s3": "#e29bf0",
        "s4": "#d8c750",
        "s5": "#b4bdc9",
    },
}
TEXT = ("ink", "muted")  # stand on paper and panel at 4.5:1 or more; s0 … s5 at 3:1 or more

_RULES = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:24px 20px 96px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .3em;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.2em 0 .5em;padding-top:.6em;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:0 0 .4em}
p{max-width:75ch;margin:.4em 0}
.lead{font-size:1.05rem}
.muted,figcaption,caption{color:var(--muted)}
code,pre{font:.86em/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
overflow-wrap:anywhere}
pre{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:10px 12px;
white-space:pre-wrap;margin:.5em 0}
.scroll{overflow-x:auto;margin:.6em 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
caption{text-align:left;padding:0 0 .35em;font-size:.88rem}
th,td{padding:5px 12px 5px 0;text-align:right;border-bottom:1px solid var(--line);
white-space:nowrap;vertical-align:top}
th:first-child,td:first-child{text-align:left}
thead th{color:var(--muted);font-weight:600}
tbody th{font-weight:500}
.wide td:last-child,.wide th:last-child{text-align:left;white-space:normal;min-width:16em}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:20px}
figure{margin:0;padding:14px 16px;background:var(--panel);border:1px solid var(--line);
border-radius:8px;min-width:0}
figcaption{font-size:.85rem;margin-top:.4em}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--muted)}
svg text.title{font-size:11.5px;fill:var(--ink)}
svg text.name{fill:var(--ink);paint-order:stroke;stroke:var(--panel);stroke-width:3px}
.grid{stroke:var(--line);stroke-width:1;fill:none}
.axis{stroke:var(--muted);stroke-width:1;fill:none}
.curve{fill:none;stroke:var(--c);stroke-width:1.8}
.shape{fill:var(--c)}
.error{stroke:var(--c);stroke-width:1.5;fill:none}
.range{stroke:var(--ink);stroke-width:2;fill:none}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;padding:0;margin:0 0 .3em;
font-size:.85rem}
.legend li{display:flex;align-items:center;gap:6px;overflow-wrap:anywhere}
svg.key{width:14px;height:14px;flex:none}
details{margin:.6em 0}
summary{cursor:pointer;font-size:.9rem}
:focus-visible{outline:3px solid var(--s0);outline-offset:1px}
.map label{margin:0 16px 0 4px;font-size:.92rem}
.map-and-types{display:grid;grid-template-columns:minmax(0,auto) minmax(0,1fr);gap:8px 32px;
align-items:start}
.grid-map{font-size:.8rem}
.grid-map th,.grid-map td{border:0;padding:1px 2px 1px 0;text-align:center}
.grid-map tbody th{padding-right:8px;text-align:right;color:var(--muted);line-height:22px}
.grid-map thead th{padding-right:6px;font-weight:500}
.cell{display:block;min-width:58px;height:22px;line-height:22px;padding:0 3px;border-radius:3px;
background:var(--bits);color:var(--bits-ink);font-size:11px;text-align:center;cursor:default}
.by-loss:checked~* .cell{background:var(--loss);color:var(--loss-ink)}
.cell:hover::after,.cell:focus::after{content:attr(aria-label);position:fixed;z-index:1;
left:12px;right:12px;bottom:12px;max-width:760px;margin:0 auto;padding:10px 14px;
background:var(--ink);color:var(--paper);font-size:14px;line-height:1.45;text-align:left;
white-space:normal;overflow-wrap:anywhere;border-radius:8px}
.cell:hover::after{z-index:2}
.outside{list-style:none;display:flex;flex-wrap:wrap;gap:8px 18px;padding:0;margin:.6em 0;
font-size:.85rem}
.outside li{display:flex;gap:8px;align-items:center}
.swatch{display:inline-block;width:14px;height:14px;border-radius:3px;background:var(--bits);
border:1px solid var(--line);vertical-align:-2px}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:4px 18px;font-size:.92rem}
dt{color:var(--muted)}
dd{margin:0;overflow-wrap:anywhere}
@media(max-width:760px){
main{padding:16px 14px 96px}
h1{font-size:1.4rem}
.map-and-types{grid-template-columns:minmax(0,1fr)}
.grid-map thead th span{writing-mode:vertical-rl;transform:rotate(180deg)}
.grid-map thead th{vertical-align:bottom}
.cell{min-width:40px;font-size:9px;padding:0 1px}
figure{padding:12px 10px}
svg text,svg text.name,svg text.title{font-size:13.5px}
table.cards,.cards caption,.cards tbody,.cards tr,.cards th,.cards td{display:block}
.cards thead{display:none}
.cards tr{border-bottom:1px solid var(--line);padding:6px 0}
.cards th,.cards td{border:0;padding:1px 0;white-space:normal}
.cards tbody th{font-weight:700}
.cards td{display:flex;justify-content:space-between;text-align:right;gap:12px}
.cards td::before{content:attr(data-label);color:var(--muted)}
dl{grid-template-columns:minmax(0,1fr);gap:0}
dd{margin:0 0 .5em}
}
@media print{.cell{print-color-adjust:exact}}
"""


def style_sheet() -> str:
    """Return the rules of the page, with the colours of both themes."""
    series = "".join(f".s{i}{{--c:var(--s{i})}}" for i in range(6))
    dark = "@media(prefers-color-scheme:dark){" + _colours("dark") + "}"
    return f"{_colours('light')}{dark}{series}{_RULES}"


def _colours(theme: str) -> str:
    return ":root{" + ";".join(f"--{name}:{value}" for name, value in THEMES[theme].items()) + "}"
