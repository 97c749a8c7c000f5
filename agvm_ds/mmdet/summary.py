"""placeholder"""
def summarize(work_dir, evaluation, clock, images, engine):
    print("SUMMARY", evaluation.latest_metrics if evaluation else None, clock.seconds, clock.updates*images/clock.seconds, engine.agvm and engine.agvm.scale_factors, engine.agvm and engine.agvm.variances)
