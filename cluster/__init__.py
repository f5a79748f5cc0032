"""Everything that runs on Ray. The only room that imports Ray.

Its own rooms, each of which imports from those before it alone: `autoscaling`, `workers`, `frontend`, `api`, `control`.
What they share is here: the plan, what members tell, calls of actors; and the way in, `launch`.
"""
