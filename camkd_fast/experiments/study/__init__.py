"""A study: strategies x pools of teachers x students x seeds, from one file of settings to one page of results.

spec -> cells -> work (in processes, see `conductor`) -> results -> tables, report
"""
