"""What stands behind `trl_recipes.evaluate`: answers of a model, their store, scores and pictures.

| module | holds |
|---|---|
| `answers` | a model's answers to batches of conversations; the evaluation that training uses |
| `predictions` | who answers which batch; the loop over all of them |
| `store` | predictions on disk, line by line, that survive a kill |
| `scoring` | metrics of stored predictions, with confidence intervals |
| `gallery` | a page of the worst and the best answers |
| `report` | what a result has to tell about its origin |
"""
