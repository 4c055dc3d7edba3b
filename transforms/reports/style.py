"""The style of a report's page: colours for light and dark, sizes that suit a phone."""

STYLE = """
:root{color-scheme:light dark;--bg:#f7f7f5;--panel:#fff;--ink:#17191c;--muted:#5b636d;--line:#e2e3e0;--grid:#ecedea;--first:#1f5fbf;--first-soft:#1f5fbf1a;
--second:#b45309;--pass:#137245;--pass-soft:#13724514;--fail:#b3261e;--fail-soft:#b3261e14;--wait:#855700;--wait-soft:#85570014;--thin:#9aa1a9;
--v0:#1a66d6;--v1:#6672cf;--v2:#9760b4;--v3:#c44a86;--v4:#e0304f;--vx:#9aa1a9}
@media (prefers-color-scheme:dark){:root{--bg:#121417;--panel:#1a1d21;--ink:#e9eaec;--muted:#a0a7b0;--line:#2d3238;--grid:#262a30;--first:#7ab0ff;--first-soft:#7ab0ff24;
--second:#f2ae5a;--pass:#63d297;--pass-soft:#63d2971f;--fail:#ff8d84;--fail-soft:#ff8d841f;--wait:#f0c060;--wait-soft:#f0c0601f;--thin:#6d757f;
--v0:#57a0ff;--v1:#8f9bff;--v2:#c08ae0;--v3:#ee7fb0;--v4:#ff6577;--vx:#767c85}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1080px;margin:0 auto;padding:2.5rem 1.5rem 1rem}
h1,h2,h3,p,figure,dl,dd,ul{margin:0}
h1{font-size:clamp(1.7rem,5vw,2.5rem);line-height:1.15;font-weight:680;letter-spacing:-.025em}
h1 small{font-size:.55em;font-weight:500;color:var(--muted);letter-spacing:-.01em;white-space:nowrap}
h2{font-size:1.3rem;font-weight:650;letter-spacing:-.015em;margin-bottom:1rem}
h3{font-size:1rem;font-weight:650;margin:1.75rem 0 .6rem}
code,pre{font:.86em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
.eyebrow{font-size:.78rem;letter-spacing:.06em;text-transform:uppercase;color:var(--muted);font-weight:600;margin-bottom:.5rem}
.sub{color:var(--muted);margin-top:.35rem}
.name{overflow-wrap:anywhere}
.verdict{margin:1.5rem 0 1rem;padding:1rem 1.25rem;border-radius:10px;border-left:5px solid var(--tone);background:var(--soft)}
.verdict p{max-width:75ch;overflow-wrap:anywhere}
.verdict .title{font-weight:680;font-size:1.15rem;color:var(--tone);letter-spacing:-.01em}
.verdict .title::before{margin-right:.5em}
.pass{--tone:var(--pass);--soft:var(--pass-soft)}.fail{--tone:var(--fail);--soft:var(--fail-soft)}.wait,.warn{--tone:var(--wait);--soft:var(--wait-soft)}
.verdict.pass .title::before,.chip.pass::before{content:"\\2713"}.verdict.fail .title::before,.chip.fail::before{content:"\\2717"}.verdict.wait .title::before{content:"\\2026"}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.2rem,1fr));gap:.75rem}
.tile{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:.7rem .9rem}
.tile.main{grid-column:span 2}
.tile dt{font-size:.78rem;color:var(--muted)}
.tile dd{font-size:1.35rem;font-weight:620;letter-spacing:-.02em;line-height:1.3}
.tile .ci{font-size:.85rem;font-weight:450;letter-spacing:0}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:1.5rem 0 .5rem;padding:.6rem 0;border-block:1px solid var(--line);font-size:.9rem}
a{color:var(--first);text-decoration:none;padding:.15rem 0}a:hover{text-decoration:underline}
:focus-visible{outline:2px solid var(--first);outline-offset:2px;border-radius:3px}
section{background:var(--panel);border:1px solid var(--line);border-radius:14px;padding:1.5rem;margin:1.25rem 0;scroll-margin-top:1rem}
.note{color:var(--muted);font-size:.88rem;max-width:80ch;margin:.6rem 0}
.callout{border-left:4px solid var(--tone);background:var(--soft);border-radius:8px;padding:.75rem 1rem;margin-bottom:1.25rem}
.callout h3{margin:0 0 .3rem;color:var(--tone)}.callout ul{padding-left:1.1rem;font-size:.92rem}.callout li{overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin:.4rem 0;-webkit-overflow-scrolling:touch}
table{border-collapse:collapse;width:100%;font-size:.88rem}
caption,.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
th,td{text-align:left;vertical-align:middle;padding:.42rem .7rem .42rem 0;border-bottom:1px solid var(--line);font-weight:400}
th:last-child,td:last-child{padding-right:0}
thead th{font-size:.76rem;color:var(--muted);font-weight:600;vertical-align:bottom;line-height:1.3}
tbody tr:last-child>*{border-bottom:0}
.n{text-align:right;white-space:nowrap}
tr.best>*{background:var(--first-soft)}tr.best>th{box-shadow:-6px 0 0 var(--first-soft)}
tr.pale{color:var(--muted)}
.ci{color:var(--muted);font-size:.88em;white-space:nowrap}.none{color:var(--muted)}
.keep{white-space:nowrap}
.bad{color:var(--fail);overflow-wrap:anywhere}
.scroll th[scope=row]>.name{display:inline-block;min-width:5.5rem}
.chip{display:inline-block;white-space:nowrap;font-size:.76rem;font-weight:620;padding:.08rem .55rem;border-radius:99px;color:var(--tone,var(--muted));background:var(--soft,var(--grid))}
.chip::before{margin-right:.35em}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,22rem),1fr));gap:1.75rem 2rem;margin:1.25rem 0}
.grid.three{grid-template-columns:repeat(auto-fill,minmax(min(100%,17rem),1fr))}
figure{min-width:0}
figcaption{font-weight:620;font-size:.92rem;margin-bottom:.55rem;overflow-wrap:anywhere}
figcaption small{font-weight:450;color:var(--muted);font-size:.86em;margin-left:.35em}
.plot{position:relative;padding-left:var(--left);font-size:.74rem;color:var(--muted);line-height:1.2}
.plot>svg{display:block;width:100%;height:auto;overflow:visible}
.yl{margin:0 0 .5rem calc(-1*var(--left))}
.ys{position:absolute;left:0;width:calc(var(--left) - .5em);top:calc(1.2em + .5rem);bottom:calc(2.4em + .7rem)}
.ys span{position:absolute;right:0;transform:translateY(50%);white-space:nowrap}
.xs{position:relative;height:1.2em;margin-top:.35rem}
.xs span{position:absolute;transform:translateX(-50%);white-space:nowrap}
.xl{text-align:right;margin-top:.35rem;min-height:1.2em}
th .xs{font-weight:450;margin-top:.2rem}.sl{font-weight:600}
svg path{fill:none;vector-effect:non-scaling-stroke}
.grid>*,svg .grid{min-width:0}
svg .grid{stroke:var(--grid);stroke-width:1}
.line{stroke-width:2;stroke-linejoin:round;stroke:var(--tint)}
.dot{stroke-linecap:round;stroke-width:5;stroke:var(--tint)}.dot.big{stroke-width:9}.dot.small{stroke-width:3.4;stroke-opacity:.6}
svg .band{fill:var(--tint);fill-opacity:.1}svg .bar{fill:var(--tint)}
.first{--tint:var(--first)}.second{--tint:var(--second)}.thin{--tint:var(--thin)}.fail{--tint:var(--fail)}.pale{--tint:var(--thin)}.v{--tint:var(--first)}
.v0,.g0{--tint:var(--v0)}.v1{--tint:var(--v1)}.v2{--tint:var(--v2)}.v3{--tint:var(--v3)}.v4{--tint:var(--v4)}.vx{--tint:var(--vx)}
.g1{--tint:var(--pass)}.g2{--tint:var(--second)}.whole{--tint:var(--muted)}.zero,.limit{--tint:var(--thin)}.limit{--tint:var(--fail)}
.line.thin,.line.whole,.line.zero,.line.limit{stroke-width:1.2}.line.thin,.line.limit{stroke-dasharray:4 4}.line.thin.solid{stroke-dasharray:none;stroke-width:1;stroke-opacity:.55}.line.faint{stroke-width:1;stroke-opacity:.6}
.line.second{stroke-width:1.8}.dot.second{stroke-width:7}
.strip{display:block;width:100%;min-width:8rem;overflow:visible}
td:has(.strip),th:has(.sl){width:55%;padding-right:1.4rem}
.swarms td:nth-child(2),.swarms th:nth-child(2){width:50%}.swarms td:nth-child(3){width:9%}.swarms td:nth-child(3) .strip{min-width:4rem}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:.8rem;color:var(--muted);margin:.5rem 0}
.key::before{content:"";display:inline-block;width:.8em;height:.8em;border-radius:50%;background:var(--tint,var(--first));margin-right:.45em;vertical-align:-.05em}
.key.thin::before{border-radius:0;height:2px;width:1.2em;vertical-align:.25em}
.timeline{margin:.25rem 0 1.25rem}
.timeline .bar{position:relative;height:1.9rem;border-radius:6px;background:repeating-linear-gradient(135deg,var(--grid) 0 4px,transparent 4px 8px);overflow:hidden}
.span{position:absolute;top:0;bottom:0;font-size:.78rem;font-weight:600;line-height:1.9rem;text-align:center;overflow:hidden;color:#fff;white-space:nowrap}
.span.train{background:#1f5fbf}.span.validate{background:#6b7280}.span.test{background:#a14a06}
.ends{display:flex;justify-content:space-between;font-size:.78rem;color:var(--muted);margin-top:.25rem}
.cell{padding:.25rem .5rem;border-radius:4px;background:color-mix(in srgb,var(--fail) calc(var(--share)*55%),transparent)}
.cell.own{background:color-mix(in srgb,var(--first) calc(var(--share)*45%),transparent)}
details{margin:.5rem 0}
summary{cursor:pointer;color:var(--first);font-size:.88rem;padding:.35rem 0;font-weight:550}
pre{overflow:auto;max-height:32rem;padding:1rem;background:var(--bg);border-radius:8px;overflow-wrap:normal}
footer{max-width:1080px;margin:0 auto;padding:.5rem 1.5rem 2.5rem;color:var(--muted);font-size:.82rem}
@media (max-width:640px){
main{padding:1.25rem .75rem .5rem}section{padding:1.1rem .9rem;border-radius:12px}footer{padding-inline:.9rem}
table{font-size:.82rem}th,td{padding-right:.55rem}.ci{display:block}
.span{font-size:.58rem}.tile dd{font-size:1.15rem}.tiles{grid-template-columns:1fr 1fr}
td>code{display:inline-block;min-width:10rem}
td:has(.strip),th:has(.sl){width:36%;padding-right:.8rem}.strip{min-width:6.5rem}
}
@media print{body{background:#fff}section{break-inside:avoid-page;border-color:#ccc}details>*{display:block}}
"""
