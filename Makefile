# make repro   set up .venv if needed, then run the study (dvc repro)
# make test    set up .venv if needed, then run the tests, all but those of minutes (pytest -m slow)
# make lab     set up .venv if needed, then open JupyterLab on the notebooks
# make benchmark   measure speed and memory on this machine, after make repro; leave it alone meanwhile
# make checkpoints   list the official weights: where from, whether there and intact
# make clean   remove everything that the study made; raw data, checkpoints and .venv stay

PYTHON ?= python3
READY := .venv/ready
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: repro test lab benchmark checkpoints clean
repro: $(READY)
	dvc repro

test: $(READY)
	pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

lab: $(READY)
	jupyter lab notebooks

benchmark: $(READY)
	papermill --log-output --no-progress-bar notebooks/benchmark_ingest.ipynb \
	  reports/notebooks/benchmark_ingest.ipynb
	papermill --log-output --no-progress-bar notebooks/benchmark_segmentation.ipynb \
	  reports/notebooks/benchmark_segmentation.ipynb
	papermill --log-output --no-progress-bar notebooks/benchmark_racnet.ipynb \
	  reports/notebooks/benchmark_racnet.ipynb
	papermill --log-output --no-progress-bar notebooks/benchmark_cnn_bert.ipynb \
	  reports/notebooks/benchmark_cnn_bert.ipynb
	papermill --log-output --no-progress-bar notebooks/benchmark_mask_net.ipynb \
	  reports/notebooks/benchmark_mask_net.ipynb

checkpoints: $(READY)
	papermill --log-output --no-progress-bar notebooks/checkpoints.ipynb \
	  reports/notebooks/checkpoints.ipynb

clean:
	rm -rf data/prepared data/integrity data/segmented data/scores data/models/*/ data/predictions \
	  data/audit data/cost data/experiments data/selected data/embeddings data/pictures \
	  data/raw/phantom data/raw/phantom-8-bit reports/notebooks/*.ipynb reports/tables reports/figures reports/curves \
	  reports/metrics.json dvc.lock

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 12) else "Python 3.11 or 3.12 is needed, this is %d.%d; try: make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv .venv
	python -m pip install --quiet uv==0.13.9
	uv pip install --quiet --compile-bytecode --python .venv/bin/python --requirement requirements.txt
	uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
	touch $@
