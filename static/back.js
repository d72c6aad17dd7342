// A page that answers a form (a refusal, a secret that is shown once) leaves the address of the page
// with the form behind: going back to it, or loading it again, never sends the form a second time.
(() => {
  const from = document.referrer && new URL(document.referrer);
  if (from && from.origin === location.origin) history.replaceState(null, "", from);
})();
