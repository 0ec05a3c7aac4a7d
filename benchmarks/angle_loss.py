"""The angle loss alone: ``python benchmarks/angle_loss.py [--quick]`` runs bench_angle.py, where everything is said."""

from bench_angle import main

if __name__ == "__main__":
    main()
