"""Which tab of the browser a listener was called from."""

# The tab's own name, which outlives a reload: by it the page knows whose job has ended.
_TAB = """((name) => {
  try {
    name = sessionStorage.getItem('zgp-tab') || name;
    sessionStorage.setItem('zgp-tab', name);
  } catch { /* storage is blocked: a reload makes another tab of this one */ }
  return window.zgpTab = name;
})(window.zgpTab || Math.random().toString(36).slice(2))"""

#: what the browser puts in the place of a listener's first input: the tab's name
WITH_TAB = f"(tab, ...others) => [{_TAB}, ...others]"
