// Command fleet runs many Konnectivity agents in one process, each with connections of its
// own: fleet COUNT FLAGS, with the flags of the Konnectivity agent.
package main

import (
	"fmt"
	"os"
	"strconv"

	"github.com/spf13/pflag"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"sigs.k8s.io/apiserver-network-proxy/cmd/agent/app/options"
	"sigs.k8s.io/apiserver-network-proxy/pkg/agent"
	"sigs.k8s.io/apiserver-network-proxy/pkg/util"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "fleet: %v\n", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("say how many agents to run")
	}
	count, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	o := options.NewGrpcProxyAgentOptions()
	flags := pflag.NewFlagSet("fleet", pflag.ContinueOnError)
	flags.AddFlagSet(o.Flags())
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	if err := o.Validate(); err != nil {
		return err
	}
	forever := make(chan struct{})
	for i := range count {
		if err := start(o, fmt.Sprintf("agent-%d", i), forever); err != nil {
			return err
		}
	}
	<-forever
	return nil
}

// start runs one agent as the Konnectivity agent's own main does.
func start(o *options.GrpcProxyAgentOptions, id string, forever <-chan struct{}) error {
	tls, err := util.GetClientTLSConfig(o.CaCert, o.AgentCert, o.AgentKey, o.ProxyServerHost, o.AlpnProtos)
	if err != nil {
		return err
	}
	config := o.ClientSetConfig(
		grpc.WithTransportCredentials(credentials.NewTLS(tls)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: o.KeepaliveTime, PermitWithoutStream: true}),
	)
	config.AgentID = id
	set := config.NewAgentClientSet(forever, forever)
	set.SetServerCounter(agent.NewAggregateServerCounter(nil, agent.NewResponseBasedCounter(set), o.ServerCountSource))
	set.Serve()
	return nil
}
