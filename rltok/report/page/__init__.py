"""The report page: what goes into it, and the files it is made of.

    facts.py        summary, accuracy with intervals, recipes and their differences, environment
    curves.py       logged metrics as panels, thinned and packed
    quantities.py   what tokens can be coloured by, and the range of a scale
    choose.py       which groups of completions fit into the page
    tokens.py       token texts as a table, and the bytes of split characters
    samples.py      the inspector's data
    encode.py       numbers -> bytes -> base64
    colors.py       colours, shared with static/color.js through static/colors.json
    heatmap.py      one completion as a static HTML fragment

    templates/      the page, filled in by Jinja with autoescape on
    static/         style and script, put into the page as they are
    vendor/         uPlot 1.6.32, which draws the curves (MIT, licence beside it)

Model output is untrusted: nothing of it is ever part of the markup. It travels in compressed data blocks, or through
Jinja's escaping, and the script puts it into the document as text nodes only; a content security policy forbids the
rest.
"""
