"""The report of runs: one HTML file with all that they say, which loads nothing from anywhere.

    write       the file
    gather      what run folders hold, read into `RunContents`
    shared      what several runs have alike is said once
    page        the HTML page; page.html, page.css, page.js, and pages.css, pages.js, which the label page shares
    sections    the sections in their order: what_was_run, results, curves
    blocks      what a section is made of: tables, grids, notes
    charts      curves as SVG
    warnings    what in the curves deserves a word
    watch       the page that grows with a run
    cell        the page, small, for a cell of a notebook
    access      who is let in to a page on this machine: here, and in feedback/
    server      such a page's answers, headers and port
    overoptimization  reward and quality over KL in several runs, with Gao et al.'s fit

Reads run folders only: importing it loads no torch.
"""
