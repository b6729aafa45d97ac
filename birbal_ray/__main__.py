"""`python -m birbal_ray` is `birbal`."""

from birbal_ray.cli.main import main

if __name__ == "__main__":
    main()
