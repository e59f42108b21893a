# `make demo` shows the project at work, `make test` compares the method with its oracles in two minutes, `make test-all`
# runs all tests, `make data` prepares the data sets, `make paper` measures all methods, and `make play` opens a page
# to play with. Each sets up .venv first. `make clean` removes .venv and runs/.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# Tests have one thread: their models are so small that more threads wait longer than they work.
OMP_NUM_THREADS ?= 1

.PHONY: demo play test test-all data paper clean

demo: $(VENV)/ready
	@$(RUN) demo/demo.py

play: $(VENV)/ready
	@$(RUN) demo/play.py

test: $(VENV)/ready
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(RUN) -m pytest -q tests --ignore=tests/more

test-all: $(VENV)/ready
	OMP_NUM_THREADS=$(OMP_NUM_THREADS) $(RUN) -m pytest -q tests

data: $(VENV)/ready
	$(RUN) data/towns/prepare.py
	$(RUN) data/tasks/prepare.py
	$(RUN) data/recipes/prepare.py

paper: $(VENV)/ready
	$(RUN) -m pip install --quiet --requirement requirements-extra.txt
	$(RUN) measure/paper.py

$(VENV)/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; name one with: make PYTHON=python3.12 demo"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "Python's venv module is missing; on Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }
	$(RUN) -m pip install --quiet --requirement requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) runs
