def unserved(case): return []
