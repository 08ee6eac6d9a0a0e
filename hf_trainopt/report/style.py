"""The style sheet of reports."""

from .theme import ARM_COLOURS, PART_COLOURS


_ROOT = ".hf-trainopt-report"

_LIGHT = {
    "paper": "#ffffff", "ink": "#1c2128", "soft": "#57606a", "rule": "#d5d9de", "grid": "#e6e8eb", "shade": "#f5f6f8",
    "link": "#1c62c4", "halo": "#ffffff",
}  # fmt: skip
_DARK = {
    "paper": "#14171c", "ink": "#e4e7eb", "soft": "#a3abb6", "rule": "#3a414b", "grid": "#2a3038", "shade": "#1d2128",
    "link": "#7fb1ff", "halo": "#14171c",
}  # fmt: skip

# `{root}` is the class that everything is below. Numbers are tabular so that columns of them line up.
_RULES = """
{root}{background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,\
"Helvetica Neue","DejaVu Sans",Arial,sans-serif;text-align:left;box-sizing:border-box;overflow-wrap:anywhere;\
-webkit-text-size-adjust:100%}
{root} *{box-sizing:border-box}
{root} h1{font-size:1.6em;line-height:1.2;margin:0 0 .6em;font-weight:650;color:inherit}
{root} h2{font-size:1.2em;line-height:1.25;margin:2.2em 0 .5em;padding-top:.7em;border-top:1px solid var(--rule);\
font-weight:650;color:inherit}
{root} h3{font-size:1em;margin:1.2em 0 .4em;font-weight:600;color:inherit}
{root} p{margin:.3em 0 .7em;max-width:46em;color:var(--soft)}
{root} nav{display:flex;flex-wrap:wrap;gap:.1em 1.1em;font-size:.94em}
{root} nav a{color:var(--link);text-decoration:none;padding:.25em 0}
{root} nav a:hover{text-decoration:underline}
{root} .scroll{overflow-x:auto;max-width:100%;margin:.5em 0 1em}
{root} table{border-collapse:collapse;font-size:.9em;line-height:1.35;font-variant-numeric:tabular-nums;margin:0;\
color:inherit;background:none;border:0;table-layout:auto}
{root} tr,{root} tbody tr:nth-child(odd),{root} tbody tr:hover{background:none}
{root} th,{root} td{padding:.38em .9em .38em 0;border:0;border-bottom:1px solid var(--grid);text-align:left;\
vertical-align:top;font-weight:400;overflow-wrap:anywhere;max-width:none;white-space:normal}
{root} td{min-width:6.6em}
{root} td.words{min-width:15em;overflow-wrap:anywhere}
{root} td.none{color:var(--soft)}
{root} thead th{font-weight:600;border-bottom:1.5px solid var(--rule);vertical-align:bottom;overflow-wrap:anywhere;\
min-width:6.6em}
{root} tbody th{color:var(--soft);position:sticky;left:0;background:var(--paper);min-width:7.5em;\
max-width:min(24em,36vw);overflow-wrap:anywhere}
{root} details{margin:.6em 0}
{root} summary{cursor:pointer;color:var(--link);padding:.3em 0}
{root} dl{margin:.4em 0;max-width:46em}
{root} dt{font-weight:600;margin-top:.6em}
{root} dd{margin:0;color:var(--soft)}
{root} ul.legend{display:flex;flex-wrap:wrap;gap:.15em 1.3em;list-style:none;margin:.5em 0;padding:0;font-size:.88em;\
line-height:1.4}
{root} ul.legend li{display:flex;align-items:baseline;margin:0;padding:0}
{root} svg{display:block;width:100%;height:auto;overflow:hidden;background:none}
{root} svg.key{display:inline-block;flex:none;width:26px;height:12px;margin-right:.5em;vertical-align:-1px}
{root} .panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:1.4em 1.6em;\
margin-top:.8em}
{root} figure{margin:0;padding:0;min-width:0;max-width:560px}
{root} figcaption{font-weight:600;font-size:.95em;margin:0 0 .35em;text-align:left;color:inherit}
{root} figcaption small{font-weight:400;font-size:.93em;color:var(--soft)}
{root} text{font-size:12.5px;fill:var(--soft);font-variant-numeric:tabular-nums}
{root} text.halo{fill:var(--ink);paint-order:stroke;stroke:var(--halo);stroke-width:3px;stroke-linejoin:round}
{root} .grid{stroke:var(--grid)}
{root} .axis{stroke:var(--soft)}
{root} .level{stroke:var(--ink);stroke-dasharray:5 4}
{root} .one{stroke:var(--ink);stroke-width:1.3}
{root} .curve{fill:none;stroke-width:2;stroke-linejoin:round}
{root} .curve.faint{stroke-width:1;opacity:.45}
{root} .curve.guess{opacity:.7}
{root} .curve.marked{stroke-width:1.8}
{root} .curve.seed{stroke-width:.9;opacity:.5}
{root} .band{opacity:.22}
{root} .band.open{opacity:.09}
{root} .interval{fill:none;stroke-width:2.2}
"""

_PAGE = """
html{background:var(--paper)}
body{margin:0}
body>{root}{max-width:1240px;margin:0 auto;padding:clamp(1em,4vw,2.4em)}
"""

_FRAGMENT = """
{root}{padding:1em;border:1px solid var(--rule);border-radius:4px;max-width:1240px;font-size:14px}
"""

# On paper: black on white whatever the screen has, nothing cut in two, folded tables shown where browsers can.
_PRINT = """
@page{margin:14mm}
{root}{font-size:10pt;max-width:none;padding:0;border:0}
{root} nav{display:none}
{root} section.short,{root} ul.legend{break-inside:avoid}
{root} h2,{root} h3,{root} figcaption,{root} ul.legend{break-after:avoid}
{root} figure,{root} tr{break-inside:avoid}
{root} .panels{grid-template-columns:1fr 1fr;gap:5mm}
{root} .scroll{overflow:visible}
{root} table{font-size:.85em}
{root} td,{root} td.words,{root} thead th,{root} tbody th{min-width:0;overflow-wrap:anywhere}
{root} tbody th{position:static}
{root} details::details-content{content-visibility:visible;display:block;height:auto}
{root} summary{list-style:none;color:inherit}
"""


def _variables(colours: dict[str, str], dark: bool) -> str:
    named = {f"arm{index}": pair[dark] for index, pair in enumerate(ARM_COLOURS)}
    named |= {f"part{index}": pair[dark] for index, pair in enumerate(PART_COLOURS)}
    scheme = "dark" if dark else "light"
    return "".join(f"--{name}:{value};" for name, value in (colours | named).items()) + f"color-scheme:{scheme}"


def stylesheet(page: bool) -> str:
    """Return the style sheet.

    Args:
        page: Of a whole page, which follows the browser's light or dark; if not, of a fragment in a notebook, which
            follows the notebook's where that says so (JupyterLab, VS Code) and else the browser's.
    """
    light, dark = _variables(_LIGHT, False), _variables(_DARK, True)
    root = ":root" if page else _ROOT
    parts = [
        f"{root}{{{light}}}",
        f"@media (prefers-color-scheme:dark){{{root}{{{dark}}}}}",
    ]
    if not page:
        of_notebook = {'[data-jp-theme-light="true"]': light, ".vscode-light": light,
                       '[data-jp-theme-light="false"]': dark, ".vscode-dark": dark}  # fmt: skip
        parts += [f"{selector} {_ROOT}{{{colours}}}" for selector, colours in of_notebook.items()]
    parts += [_RULES, _PAGE if page else _FRAGMENT, f"@media print{{{root}{{{light}}}{_PRINT}}}"]
    return "\n".join(parts).replace("{root}", _ROOT)
