"""The expert worker: holds experts, joins the dispatches of all routers, computes exactly the rows that it got."""
