"""The page's stylesheet, in light and dark colours from the table that the PNGs use."""

from diva_jax.report.canvas import COLOURS


def css() -> str:
    """Returns the page's CSS."""
    light, dark = ("".join(f"--{role}:{pair[i]};" for role, pair in COLOURS.items()) for i in (0, 1))
    return f":root{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{_RULES}"


_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);line-height:1.5;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif;overflow-wrap:anywhere}
main{max-width:1008px;margin:0 auto;padding:56px 24px 72px}
h1,h2{font-family:"Iowan Old Style",Charter,"Palatino Linotype",Palatino,Georgia,"DejaVu Serif",serif;
font-weight:600;letter-spacing:-.01em;text-wrap:balance}
h1{font-size:clamp(36px,6.2vw,60px);line-height:1.08;margin:10px 0 18px}
h1 span{display:block;font-size:clamp(20px,2.8vw,27px);line-height:1.25;margin-bottom:10px;max-width:32em}
h1 small{font:400 clamp(17px,2vw,21px)/1.3 system-ui,-apple-system,"Segoe UI",Roboto,Helvetica,Arial,sans-serif;
letter-spacing:0;display:inline-block}
h2{font-size:25px;line-height:1.25;margin:0}
h3{font-size:16px;margin:26px 0 12px}
h3 small{color:var(--muted);font-weight:400}
p{margin:0 0 12px;max-width:68ch}
small,.fine{font-size:13px;color:var(--muted)}
.eyebrow{font-size:13px;letter-spacing:.02em;color:var(--muted);margin:0}
.lead{font-size:18px}
.up::before,.down::before,.zero::before{margin-right:.45em;font-size:.8em}
.up::before{content:"▲";color:var(--muted)}
.down::before{content:"▼";color:var(--muted)}
.zero::before{content:"○";color:var(--muted)}
.won::before{color:var(--won)}
.lost::before,.doubted::before{color:var(--lost)}
.doubted::before{content:"!"}
.alarms{list-style:none;margin:0 0 32px;padding:0;font-size:15px}
.alarms li{padding:10px 14px;margin:0 0 6px;background:var(--panel);border:1px solid var(--grid);
border-left:5px solid var(--lost)}
.alarms .bad b{color:var(--lost)}
.alarms .doubt{border-left-color:var(--axis)}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin-top:28px;font-size:14px}
nav a{color:var(--s1);text-decoration:underline;text-underline-offset:3px;padding:4px 0}
.facts{list-style:none;margin:20px 0 0;padding:0;font-size:13px;color:var(--muted)}
.findings{list-style:none;margin:28px 0 0;padding:0;border-top:1px solid var(--grid)}
.findings li{padding:11px 0;border-bottom:1px solid var(--grid)}
.findings small{display:block}
section{margin-top:64px}
section>header{border-top:2px solid var(--ink);padding-top:14px;margin-bottom:18px}
section>header p{color:var(--muted);font-size:14px;margin:4px 0 0}
.plain{border-left:3px solid var(--s2);padding:2px 0 2px 14px}
.lines{overflow-x:auto}
.lines,.stacks{margin:0 0 10px}
.lines th,.lines td{overflow-wrap:break-word;min-width:92px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:15px}
th,td{text-align:right;vertical-align:top;padding:10px 0 10px 18px;border-bottom:1px solid var(--grid)}
th:first-child{text-align:left;padding-left:0}
thead th{font-size:13px;font-weight:500;color:var(--muted);vertical-align:bottom}
tbody th{font-weight:400}
td b{font-weight:600;font-size:17px;white-space:nowrap}
td small{display:block;line-height:1.35;margin-top:2px}
td b::before{font-size:11px;margin-right:5px;vertical-align:2px}
.swatch{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px}
.figures{display:grid;grid-template-columns:1fr 1fr;gap:20px;margin:20px 0}
.figures figure{margin:0;min-width:0;background:var(--panel);border:1px solid var(--grid);border-radius:10px;
padding:18px 20px 14px}
.figures figure:not(.half){grid-column:1/-1}
.figures figcaption{font-size:13px;color:var(--muted);margin-top:6px}
svg{display:block;width:100%;height:auto}
svg text{font-variant-numeric:tabular-nums}
.narrow{display:none}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(270px,1fr));gap:16px}
.card{background:var(--panel);border:1px solid var(--grid);border-radius:10px;padding:12px;min-width:0}
.card header{font-size:13px;color:var(--muted);margin-bottom:10px}
.card header b{color:var(--ink)}
.sides{display:grid;grid-template-columns:1fr 1fr;gap:12px}
.card figure{margin:0;min-width:0;display:flex;flex-direction:column}
.card img,.missing{width:100%;aspect-ratio:1;object-fit:contain;border-radius:6px;display:block;background:var(--grid)}
.missing{padding:12px;font-size:13px;color:var(--muted);margin:0}
.card figcaption{font-size:13px;line-height:1.4;margin-top:8px;display:flex;flex-direction:column;flex:1;gap:6px}
.card figcaption svg{max-width:160px;margin-top:auto}
h3.won{color:var(--won)}
h3.lost{color:var(--lost)}
.strip{display:grid;grid-template-columns:repeat(var(--columns),minmax(0,1fr));gap:10px;margin-top:14px}
.strip figure{margin:0;min-width:0}
.strip img{width:100%;display:block;border-radius:4px;image-rendering:auto}
.strip figcaption,.legend{font-size:13px;color:var(--muted);margin-top:4px}
.legend{max-width:none}
.legend span{display:inline-block;margin-right:12px}
details{border-bottom:1px solid var(--grid)}
summary{cursor:pointer;padding:12px 0;font-weight:500}
summary small{font-weight:400}
dl{display:grid;grid-template-columns:minmax(0,18em) minmax(0,1fr);gap:4px 20px;margin:4px 0 20px;font-size:14px}
dt{color:var(--muted)}
dd{margin:0;font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:13px}
footer{margin-top:56px;color:var(--muted);font-size:13px}
:focus-visible{outline:2px solid var(--s1);outline-offset:2px}
@media (max-width:760px){
main{padding:32px 16px 48px}
section{margin-top:48px}
.wide{display:none}
.narrow{display:block;max-width:480px}
.figures{grid-template-columns:1fr;gap:14px}
.figures figure{padding:14px 14px 12px}
th,td{padding-left:10px}
.stacks table,.stacks thead,.stacks tbody{display:block}
.stacks tr{display:grid;grid-template-columns:repeat(var(--columns),minmax(0,1fr));gap:0 10px;
border-bottom:1px solid var(--grid);padding:10px 0}
.stacks th,.stacks td{border:0;padding:0;text-align:left}
.stacks thead th:first-child{display:none}
.stacks tbody th{grid-column:1/-1;padding:0 0 6px;font-weight:500}
.lines{overflow-x:visible}
.lines table,.lines tbody{display:block}
.lines thead{display:none}
.lines tr{display:block;border-bottom:1px solid var(--grid);padding:10px 0}
.lines th,.lines td{border:0;padding:0;text-align:left;min-width:0}
.lines tbody th{display:block;padding:0 0 6px;font-weight:500}
.lines td{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:0 12px;padding:3px 0}
.lines td::before{content:attr(data-name);font-size:13px;color:var(--muted)}
.strip{grid-template-columns:1fr 1fr}
dl{grid-template-columns:1fr;gap:0}
dd{margin-bottom:8px}
}
@media print{body{background:#fff}section{break-inside:avoid-page}}
"""
