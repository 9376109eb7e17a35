// Command konnectivity-client drives a tunnel server with the unmodified upstream
// Konnectivity client library, used the way kube-apiserver uses it.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"k8s.io/klog/v2"
	"sigs.k8s.io/apiserver-network-proxy/konnectivity-client/pkg/client"
)

const (
	exitOK     = 0
	exitFailed = 1
	exitDial   = 3
)

// command is one subcommand. setup registers its flags and returns what runs
// once they have been parsed.
type command struct {
	name  string
	brief string
	setup func(*flag.FlagSet) func(*dialer) error
	// findsTarget is for a command that does not take its target from a flag.
	findsTarget bool
}

var commands = []command{
	{
		name: "echo", setup: setupEcho,
		brief: "send bytes to an echo server and compare what comes back",
	},
	{
		name: "upload", setup: setupUpload,
		brief: "send bytes and close at once, or after a one-line answer",
	},
	{
		name: "download", setup: setupDownload,
		brief: "read a number of bytes, or until the end of the stream",
	},
	{name: "ping", brief: "echo latency at a fixed rate on one connection", setup: setupPing},
	{name: "dials", brief: "open and close many connections", setup: setupDials},
	{
		name: "banner", setup: setupBanner,
		brief: "read the first line of a server that speaks first",
	},
	{name: "slow-close", brief: "close in the middle of an endless stream", setup: setupSlowClose},
	{name: "cut", brief: "show how the end of a connection looks", setup: setupCut},
	{name: "hold", brief: "keep connections open until stdin is closed", setup: setupHold},
	{
		name: "load", setup: setupLoad, findsTarget: true,
		brief: "carry out a plan of workloads from stdin",
	},
}

// errQuietFailure ends the program with exit status 1 when the JSON line has
// already said what went wrong.
var errQuietFailure = errors.New("the run failed")

// dialError marks an error of the dial itself.
type dialError struct{ error }

func (e dialError) Unwrap() error { return e.error }

func main() {
	os.Exit(run(os.Args[1:]))
}

func run(args []string) int {
	if len(args) == 0 {
		usage(os.Stderr)
		return exitFailed
	}
	switch args[0] {
	case "help", "-h", "-help", "--help":
		usage(os.Stdout)
		return exitOK
	}
	for _, c := range commands {
		if c.name == args[0] {
			return c.run(args[1:])
		}
	}
	fmt.Fprintf(os.Stderr, "konnectivity-client: no command %q\n", args[0])
	usage(os.Stderr)
	return exitFailed
}

func (c command) run(args []string) int {
	var d dialer
	var verbose bool
	fs := flag.NewFlagSet("konnectivity-client "+c.name, flag.ContinueOnError)
	fs.StringVar(&d.uds, "uds", "", "the server's unix socket `path`")
	if !c.findsTarget {
		fs.StringVar(&d.target, "target", "", "`host:port` to dial through the tunnel")
	}
	fs.DurationVar(&d.timeout, "timeout", time.Minute, "limit of one dial, one read or one write")
	fs.BoolVar(&verbose, "verbose", false, "let the client library log to stderr")
	exec := c.setup(fs)
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return exitOK
		}
		return exitFailed
	}
	if err := errors.Join(d.check(fs.Args()), c.checkTarget(d.target)); err != nil {
		fmt.Fprintf(os.Stderr, "konnectivity-client %s: %v\n", c.name, err)
		return exitFailed
	}
	setLogging(verbose)

	err := exec(&d)
	var failed dialError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &failed):
		_, reason := client.GetDialFailureReason(failed)
		printJSON(struct {
			Error  string `json:"error"`
			Reason string `json:"reason"`
		}{failed.Error(), string(reason)})
		return exitDial
	case errors.Is(err, errQuietFailure):
		return exitFailed
	default:
		fmt.Fprintf(os.Stderr, "konnectivity-client %s: %v\n", c.name, err)
		return exitFailed
	}
}

func (c command) checkTarget(target string) error {
	if target == "" && !c.findsTarget {
		return errors.New("--target is required")
	}
	return nil
}

func usage(w io.Writer) {
	fmt.Fprintln(w, "usage: konnectivity-client COMMAND --uds PATH --target HOST:PORT "+
		"[--timeout 60s] [--verbose] [flags]")
	fmt.Fprintln(w)
	for _, c := range commands {
		fmt.Fprintf(w, "  %-11s %s\n", c.name, c.brief)
	}
	fmt.Fprintln(w)
	fmt.Fprintln(w, "load has no --target: its plan names the target.")
	fmt.Fprintln(w, "konnectivity-client COMMAND --help lists the flags of one command.")
}

// setLogging discards what the client library logs, or shows all of it.
func setLogging(verbose bool) {
	settings := map[string]string{"v": "5"}
	if !verbose {
		// Errors go to stderr by their severity, whatever the output is.
		settings = map[string]string{"logtostderr": "false", "stderrthreshold": "FATAL"}
		klog.SetOutput(io.Discard)
	}
	fs := flag.NewFlagSet("klog", flag.ContinueOnError)
	klog.InitFlags(fs)
	for name, value := range settings {
		if err := fs.Set(name, value); err != nil {
			fmt.Fprintf(os.Stderr, "konnectivity-client: log setting %s: %v\n", name, err)
		}
	}
}

// printJSON prints v as one line.
func printJSON(v any) {
	if err := json.NewEncoder(os.Stdout).Encode(v); err != nil {
		fmt.Fprintf(os.Stderr, "konnectivity-client: cannot print the result: %v\n", err)
		os.Exit(exitFailed)
	}
}

// atLeast reports a flag value below its minimum.
func atLeast[T int | int64 | time.Duration](name string, value, minimum T) error {
	if value < minimum {
		return fmt.Errorf("--%s must be at least %v, not %v", name, minimum, value)
	}
	return nil
}
