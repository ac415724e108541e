"""The style of all reports."""

__all__ = ["STYLE"]

_LIGHT = """
color-scheme: light; --ink: #1a1f2b; --soft: #5d6678; --line: #e3e6ec; --axis: #9aa3b2; --paper: #fff; --back: #f4f5f8;
--good: #e9f7ef; --good-line: #9fd8b6; --warn: #fff6e2; --warn-line: #f2d38a; --hatch: #e6e8ed; --faint: #b4bac6;
--t0: #0a6ebd; --t1: #c8500a; --t2: #07855f; --t3: #a03d8c; --t4: #9a6a00; --t5: #2f8fb3; --t6: #b3263a; --t7: #5b6470;
"""
_DARK = """
color-scheme: dark; --ink: #e9ecf2; --soft: #a3adbd; --line: #333a47; --axis: #6b7587; --paper: #1b1f28;
--back: #12151b; --good: #14301f; --good-line: #2c6b46; --warn: #362c12; --warn-line: #6d5820; --hatch: #2d3440;
--faint: #596273; --t0: #62b3f5; --t1: #ff9457; --t2: #3fcb9e; --t3: #e391cf; --t4: #e0b040; --t5: #86cfe8;
--t6: #ff7d8c; --t7: #b0b9c6;
"""

STYLE = f"""
:root {{ {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; }}
body {{ margin: 0; background: var(--back); color: var(--ink); }}
body {{ font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }}
main {{ max-width: 1080px; margin: 0 auto; padding: 36px 24px 72px; }}
h1 {{ font-size: 27px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 19px; line-height: 1.3; margin: 0 0 4px; }}
h3 {{ font-size: 14px; margin: 20px 0 6px; }}
p {{ margin: 0; }}
small {{ color: var(--soft); font-weight: 400; font-size: 12px; }}
code, pre {{ font: 12.5px/1.55 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }}
pre {{ margin: 0; padding: 10px 12px; white-space: pre-wrap; background: var(--back); }}
pre {{ border: 1px solid var(--line); border-radius: 8px; }}
a {{ color: var(--t0); }}
.lead {{ color: var(--soft); max-width: 78ch; margin: 2px 0 12px; font-size: 14px; }}
.verdict, .champion {{ margin: 18px 0 0; padding: 14px 18px; background: var(--good); }}
.verdict, .champion {{ border: 1px solid var(--good-line); border-radius: 10px; }}
.verdict {{ font-size: 19px; line-height: 1.4; font-weight: 600; overflow-wrap: anywhere; }}
.champion {{ padding: 9px 14px; }} .champion b {{ margin-right: 8px; }}
.unlike, .verdict.open {{ background: var(--warn); border: 1px solid var(--warn-line); border-radius: 8px; }}
.unlike {{ margin: 4px 0 10px; padding: 8px 12px; }}
dl.facts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 14px 24px; }}
dl.facts {{ margin: 20px 0 0; }} dl.facts div {{ border-top: 2px solid var(--line); padding-top: 7px; }}
dl.facts dt {{ color: var(--soft); font-size: 12.5px; }}
dl.facts dd {{ margin: 0; font-size: 17px; font-weight: 600; overflow-wrap: anywhere; }}
dl.facts dd small {{ display: block; line-height: 1.4; }}
section {{ background: var(--paper); border: 1px solid var(--line); border-radius: 12px; }}
section {{ padding: 22px 24px; margin-top: 20px; }}
figure {{ margin: 0; }} svg {{ width: 100%; height: auto; display: block; overflow: visible; }}
.narrow {{ display: none; }}
.panels {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 26px 36px; }}
.panels svg {{ max-width: 490px; }}
.grid {{ stroke: var(--line); }} .axis {{ stroke: var(--axis); }}
.tick {{ font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; }}
.name, .label {{ font-size: 12.5px; fill: var(--ink); }} .strong {{ font-weight: 700; }}
.label {{ font-variant-numeric: tabular-nums; }}
.t0 {{ --c: var(--t0); }} .t1 {{ --c: var(--t1); }} .t2 {{ --c: var(--t2); }} .t3 {{ --c: var(--t3); }}
.t4 {{ --c: var(--t4); }} .t5 {{ --c: var(--t5); }} .t6 {{ --c: var(--t6); }} .t7 {{ --c: var(--t7); }}
.faint {{ --c: var(--faint); }}
.line {{ fill: none; stroke: var(--c); stroke-linejoin: round; stroke-linecap: round; }}
.line.normal {{ stroke-width: 1.8; }} .line.thin {{ stroke-width: 1.1; }} .line.thick {{ stroke-width: 2.8; }}
.leader {{ fill: none; stroke: var(--c); stroke-width: 1; opacity: .45; }}
.mark {{ fill: var(--c); stroke: var(--paper); stroke-width: .8; }}
.ring {{ fill: none; stroke: var(--ink); stroke-width: 1.6; }}
.band {{ fill: var(--c); opacity: .22; }} .mean {{ stroke: var(--ink); stroke-width: 2; }}
.series {{ font-size: 12px; fill: var(--c); font-weight: 600; }}
.series {{ paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }}
.trend {{ fill: none; stroke: var(--c); stroke-width: 1.1; opacity: .55; }}
.key {{ margin: 0 0 12px; font-size: 13px; }} .key span {{ margin-right: 18px; display: inline-block; }}
.key.list {{ margin: 6px 0 0; }} .key.list span {{ display: block; padding-left: 18px; text-indent: -18px; }}
.swatch {{ width: 12px; height: 12px; display: inline-block; vertical-align: -1px; margin-right: 6px; }}
.swatch {{ background: var(--c); border-radius: 50%; }} .t1.swatch, .t5.swatch {{ border-radius: 1px; }}
.stroke {{ width: 26px; height: 0; display: inline-block; vertical-align: 4px; margin-right: 7px; }}
.stroke {{ border-top: 2.5px solid var(--c); }} .d1 {{ border-top-style: dashed; }} .d2 {{ border-top-style: dotted; }}
.t2.swatch, .t6.swatch {{ border-radius: 0; clip-path: polygon(50% 0, 100% 95%, 0 95%); }}
.t3.swatch, .t7.swatch {{ border-radius: 0; clip-path: polygon(50% 0, 100% 50%, 50% 100%, 0 50%); }}
figcaption {{ color: var(--soft); font-size: 13px; margin-top: 6px; overflow-wrap: anywhere; }}
.columns {{ display: grid; grid-template-columns: 1fr 1fr; gap: 26px; margin-top: 20px; }}
.scroll {{ overflow-x: auto; }} figure + .scroll {{ margin-top: 18px; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13px; }}
td, th {{ text-align: left; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }}
td.long {{ min-width: 200px; }}
td:last-child, th:last-child {{ padding-right: 0; }}
th {{ color: var(--soft); font-weight: 600; }} tr.best td {{ font-weight: 700; }}
.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.protocol td:first-child {{ white-space: nowrap; color: var(--soft); }}
.heat {{ border-collapse: separate; border-spacing: 5px; table-layout: fixed; }}
.heat td, .heat th {{ border: 0; padding: 8px 10px; text-align: center; vertical-align: middle; }}
.heat th[scope=row] {{ text-align: right; }} .heat .corner {{ text-align: right; font-weight: 400; }}
.heat .over {{ font-weight: 400; padding-bottom: 0; }}
.heat th[scope] {{ color: var(--ink); }}
.heat tbody td {{ border-radius: 6px; position: relative; font-variant-numeric: tabular-nums; }}
.heat tbody td {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
.heat td b {{ display: block; font-size: 15px; line-height: 1.35; }}
.heat td small {{ display: block; color: inherit; opacity: .85; line-height: 1.35; }}
.heat td i {{ position: absolute; top: 5px; right: 8px; font: 700 10.5px/1.2 system-ui, "DejaVu Sans", sans-serif; }}
.heat td.best {{ box-shadow: 0 0 0 2px var(--paper), 0 0 0 4.5px var(--ink); }}
.heat .failed, .heat .stopped {{ color: var(--ink); border: 1px dashed var(--axis); }}
.heat .failed {{ background: repeating-linear-gradient(45deg, var(--hatch) 0 1.5px, transparent 1.5px 9px); }}
.heat .stopped {{ background: repeating-linear-gradient(0deg, var(--hatch) 0 1.5px, transparent 1.5px 9px); }}
.heat .failed b, .heat .stopped b {{ font-size: 13px; }}
.sheets {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 260px), 1fr)); gap: 20px; }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 24px; }}
.pair figure {{ max-width: 520px; }}
.sheets img, .pair img {{ width: 100%; image-rendering: pixelated; display: block; }}
.sheets img, .pair img {{ border: 1px solid var(--line); border-radius: 6px; }}
@media (max-width: 720px) {{
main {{ padding: 20px 10px 48px; }} section {{ padding: 16px 14px; }} h1 {{ font-size: 22px; }}
.verdict {{ font-size: 16.5px; padding: 12px 14px; }} .columns {{ grid-template-columns: 1fr; }}
.wide {{ display: none; }} .narrow {{ display: block; }}
.heat td, .heat th {{ padding: 7px 4px; }} .heat td i {{ position: static; display: block; }}
}}
@media print {{
body {{ background: #fff; font-size: 12.5px; }} main {{ max-width: none; padding: 0; }}
section {{ border: 0; border-top: 1px solid var(--line); border-radius: 0; padding: 14px 0; margin-top: 14px; }}
h2, h3 {{ break-after: avoid; }} figure, tr, .heat, .verdict, dl.facts {{ break-inside: avoid; }}
.scroll {{ overflow: visible; }} td, th {{ padding: 3px 9px 3px 0; font-size: 11.5px; }} td.long {{ min-width: 0; }}
.wide {{ display: block; }} .narrow {{ display: none; }}
.panels, .pair {{ grid-template-columns: 1fr 1fr; }}
* {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
}}
"""
"""CSS. Series have the classes t0 to t7, drawn in colours that differ in lightness as well as in hue."""
