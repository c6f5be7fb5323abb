"""A study: strategies x pools of teachers x students x seeds, from one settings file to one page of results.

spec -> cells -> work (in the processes of `conductor`) -> records -> findings -> study_tables, study_report
"""
