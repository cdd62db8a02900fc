"""The page's colours and layout, as CSS: light and dark, by the reader's system."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --pale: #667; --back: #fff; --card: #f5f6f8; --edge: #d5d8de;
  --plus: #f0a020; --minus: #4a90e2; --cell: #b3400a;
  --c0: #1f6fb5; --c1: #c2571a; --c2: #2c8a57; --c3: #8a4fb0; --c4: #a0782c; --c5: #58606e;
  --erases: #111; --reflects: #b0148a; --reverses: #7a3fc0; --rotates: #1f6fb5; --amplifies: #c9371d; --damps: #2c8a57;
  --keeps: #9aa0aa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6ea; --pale: #9aa3b0; --back: #15171a; --card: #1f2226; --edge: #3a3f47;
  --plus: #b9740a; --minus: #2f6fb8; --cell: #ff9a5c;
  --c0: #6cb2f2; --c1: #f09a5e; --c2: #6ccf97; --c3: #c79be8; --c4: #d8b469; --c5: #aab2c0;
  --erases: #fff; --reflects: #f276d2; --reverses: #b795f0; --rotates: #6cb2f2; --amplifies: #ff7f68; --damps: #6ccf97;
  --keeps: #7b828d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1.2rem 1.4rem 4rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: .2rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; }
h3 span, summary span { font-weight: normal; color: var(--pale); margin-left: .8em; }
.facts, .where, figcaption { color: var(--pale); } .facts { margin: .3rem 0; }
.note { border-left: 3px solid var(--plus); padding-left: .7em; margin: .5rem 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; margin: 1rem 0; }
figure { margin: 0; background: var(--card); border: 1px solid var(--edge); border-radius: 6px; padding: .6rem; }
figcaption { font-size: .87rem; padding: .2rem .4rem; }
svg { display: block; width: 100%; height: auto; margin: auto; }
svg text { fill: var(--pale); font-size: 12px; }
.grid line.grid, line.grid { stroke: var(--edge); stroke-width: .6; } line.zero { stroke: var(--pale); stroke-width: .8; }
line.mark { stroke: var(--ink); stroke-width: 1.2; } rect.frame { fill: none; stroke: var(--edge); }
circle.unit { fill: none; stroke: var(--pale); stroke-width: 1.2; stroke-dasharray: 5 4; } rect.cell { fill: var(--cell); }
.line { fill: none; stroke-width: 1.4; opacity: .7; } .dot { fill-opacity: .85; stroke: var(--card); stroke-width: .5; }
.entry { white-space: nowrap; }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin: 0 .35em 0 .2em; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); } .s4 { --c: var(--c4); }
.s5 { --c: var(--c5); } .erases { --c: var(--erases); } .reflects { --c: var(--reflects); } .reverses { --c: var(--reverses); }
.rotates { --c: var(--rotates); } .amplifies { --c: var(--amplifies); } .damps { --c: var(--damps); }
.keeps { --c: var(--keeps); }
.dot { fill: var(--c); } .line { stroke: var(--c); } .key { background: var(--c); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .18rem .7rem .18rem 0; text-align: right; vertical-align: top; } th { font-weight: 600; }
thead th { border-bottom: 1px solid var(--edge); } .left { text-align: left; }
td a { white-space: nowrap; } tbody tr:hover { background: var(--card); }
a { color: var(--c0); text-decoration: none; } a:hover { text-decoration: underline; }
details { margin: .4rem 0; } summary { cursor: pointer; font-weight: 600; }
details.module { background: var(--card); border: 1px solid var(--edge); border-radius: 6px; padding: .5rem .9rem; }
details.inner { margin-left: .2rem; } details.inner summary { font-weight: normal; color: var(--pale); }
section.direction { border-top: 1px solid var(--edge); padding-bottom: .6rem; }
table.tokens th { font-weight: normal; color: var(--pale); min-width: 5.2em; }
code { background: var(--back); border: 1px solid var(--edge); border-radius: 4px; padding: 0 .3em; font-size: .92em;
  white-space: nowrap; } code.pale { color: var(--pale); border-style: dotted; } code.clear { font-weight: 600; }
blockquote { margin: .5rem 0; padding: .4rem .7rem; background: var(--back); border: 1px solid var(--edge); border-radius: 4px; }
.where { display: block; font-size: .82rem; } .text { white-space: pre-wrap; overflow-wrap: anywhere; }
mark { color: inherit; border-radius: 2px; background: color-mix(in srgb, var(--tone) var(--share), transparent); }
mark.plus { --tone: var(--plus); } mark.minus { --tone: var(--minus); } mark.peak { outline: 1.5px solid var(--ink); }
"""
