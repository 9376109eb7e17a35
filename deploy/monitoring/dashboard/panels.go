package main

import "fmt"

// A question, and the panels that answer it.
type row struct {
	title  string
	panels []panel
}

// What the variables select, for queries of servers and of agents.
const (
	servers = `cluster=~"$cluster", job=~"$job", instance=~"$server"`
	agents  = `cluster=~"$cluster", job=~"$job", instance=~"$agent"`
)

// Numbers of events within the time between two points.
func events(by, counter, selector string) string {
	return "sum by (" + by + ") (increase(" + counter + "{" + selector + "}[$__rate_interval]))"
}

func rate(by, counter, selector string) string {
	return "sum by (" + by + ") (rate(" + counter + "{" + selector + "}[$__rate_interval]))"
}

func quantile(of, by, histogram, selector string) string {
	return "histogram_quantile(" + of + ", " + rate(by, histogram+"_bucket", selector) + ")"
}

// The part of the packets that one side sent and that were lost.
func loss(by, side, selector string) string {
	return rate(by, "culvert_"+side+"_tunnel_lost_packets_total", selector) + " / " +
		rate(by, "culvert_"+side+"_tunnel_sent_packets_total", selector)
}

// A value of the servers, and the largest ones of the agents. Every process has the metric, so
// that `All` as the instance selects too much.
func ofEach(value string) []query {
	of := func(selector, kind string) string {
		return fmt.Sprintf(value, selector) + " and on (job, instance) " + kind + "{" + selector + "}"
	}
	return []query{
		{of(servers, "culvert_server_tunnels"), "{{instance}}"},
		{"topk(" + most + ", " + of(agents, "konnectivity_network_proxy_agent_open_server_connections") + ")", "{{instance}}"},
	}
}

// The number of the largest series.
const most = "10"

var one = 1.0

var rows = []row{
	{"Is everyone connected?", []panel{
		{kind: number, width: 4, title: "Servers", unit: "short", description: "Servers that answer scrapes.",
			queries: []query{{`count(culvert_server_tunnels{` + servers + `})`, "servers"}}},
		{kind: number, width: 4, title: "Agents", unit: "short", description: "Agents that answer scrapes.",
			queries: []query{{`count(konnectivity_network_proxy_agent_open_server_connections{` + agents + `})`, "agents"}}},
		{kind: number, width: 4, title: "Agents without a tunnel", unit: "short", red: &one, description: "Their nodes cannot be reached.",
			queries: []query{{`sum(konnectivity_network_proxy_agent_open_server_connections{` + agents + `} == bool 0)`, "agents"}}},
		{kind: number, width: 4, title: "Agents that lack a server", unit: "short", red: &one, description: "They have fewer tunnels than they know servers.",
			queries: []query{{`sum(konnectivity_network_proxy_agent_open_server_connections{` + agents + `} < bool konnectivity_network_proxy_agent_known_server_count{` + agents + `})`, "agents"}}},
		{kind: number, width: 4, title: "Ids of several agents", unit: "short", red: &one, description: "Dials may reach the wrong node.",
			queries: []query{{`sum(culvert_server_duplicate_agents{` + servers + `})`, "ids"}}},
		{kind: number, width: 4, title: "Firing alerts", unit: "short", red: &one, description: "Alerts of these jobs. docs/operations.md §17 says what to do.",
			queries: []query{{`count(ALERTS{alertname=~"Culvert.*", alertstate="firing", cluster=~"$cluster", job=~"$job"}) or vector(0)`, "alerts"}}},
		{title: "Agents by server", unit: "short", description: "Servers of one set have the same number.",
			queries: []query{{`sum by (instance) (culvert_server_agents_by_version{` + servers + `})`, "{{instance}}"}}},
		{kind: bars, title: "Tunnels that ended", unit: "short", description: "By reason. done, drained and superseded are orderly ends.",
			queries: []query{{events("reason", "culvert_server_tunnels_lost_total", servers), "{{reason}}"}}},
		{kind: stacked, title: "Agents by version", unit: "short", description: "How far a rollout is. An agent counts once for each server.",
			queries: []query{{`sum by (version) (culvert_server_agents_by_version{` + servers + `})`, "{{version}}"}}},
	}},
	{"Is it fast?", []panel{
		{title: "Dials", unit: "s", description: "Time of dials that succeeded, from the request to the agent's reply.",
			queries: []query{
				{quantile("0.5", "le", "culvert_server_dial_duration_seconds", servers), "median"},
				{quantile("0.99", "le", "culvert_server_dial_duration_seconds", servers), "99 %"},
			}},
		{title: "Targets", unit: "s", description: "The agents' part of it: to look up and connect to a target.",
			queries: []query{
				{quantile("0.5", "le", "culvert_agent_dial_duration_seconds", agents), "median"},
				{quantile("0.99", "le", "culvert_agent_dial_duration_seconds", agents), "99 %"},
			}},
		{title: "Round trips", unit: "s", description: "Smoothed round-trip time of the tunnels.",
			queries: []query{
				{`quantile(0.5, culvert_server_tunnel_rtt_seconds{` + servers + `})`, "median"},
				{`max(culvert_server_tunnel_rtt_seconds{` + servers + `})`, "slowest"},
			}},
		{title: "Dial rate", unit: "cps", description: "Dials per second that succeeded.",
			queries: []query{{rate("instance", "culvert_server_dial_duration_seconds_count", servers), "{{instance}}"}}},
		{title: "Throughput", unit: "Bps", description: "Bytes of connections, without those of the tunnels themselves.",
			queries: []query{{rate("direction", "culvert_server_stream_bytes_total", servers), "{{direction}}"}}},
		{title: "Connections", unit: "short", description: "Connections now, and dials that wait for an agent's reply.",
			queries: []query{
				{`sum by (instance) (konnectivity_network_proxy_server_established_connections{` + servers + `})`, "{{instance}}"},
				{`sum(konnectivity_network_proxy_server_pending_backend_dials{` + servers + `})`, "pending dials"},
			}},
	}},
	{"What is lost?", []panel{
		{title: "Packets to agents", unit: "percentunit", description: "Part of the servers' packets that was lost. Users notice from 1 % on.",
			queries: []query{{loss("instance", "server", servers), "{{instance}}"}}},
		{title: "Packets to servers", unit: "percentunit", description: "Part of the agents' packets that was lost, of all agents.",
			queries: []query{{loss("server_id", "agent", agents), "to {{server_id}}"}}},
		{kind: bars, title: "Connections that were cut", unit: "short", description: "Ends that were not in order, by code. tunnel_lost are connections that users lost with their tunnel.",
			queries: []query{{events("code", "culvert_server_stream_ends_total", servers+`, manner="reset"`), "{{code}}"}}},
		{kind: bars, title: "Dials that lost their agent", unit: "short", description: "moved: repeated on another tunnel. Waited for an agent that came, or that did not.",
			queries: []query{
				{events("job", "culvert_server_dials_moved_total", servers), "moved"},
				{events("result", "culvert_server_dials_waited_total", servers), "waited: {{result}}"},
			}},
		{title: "Second copies", unit: "cps", description: "Short writes that were sent twice, per second, and copies that came first: keystrokes that did not wait for a loss.",
			queries: []query{
				{rate("job", "culvert_server_tunnel_copies_sent_total", servers), "sent by servers"},
				{rate("job", "culvert_server_tunnel_copies_used_total", servers), "used by servers"},
				{rate("job", "culvert_agent_tunnel_copies_sent_total", agents), "sent by agents"},
				{rate("job", "culvert_agent_tunnel_copies_used_total", agents), "used by agents"},
			}},
		{title: "Repaired bursts", unit: "cps", description: "Packets per second that repair short bursts, and bursts that were rebuilt from them: answers that did not wait for a loss.",
			queries: []query{
				{rate("job", "culvert_server_tunnel_repair_packets_sent_total", servers), "repair packets of servers"},
				{rate("job", "culvert_server_tunnel_bursts_rebuilt_total", servers), "bursts that servers rebuilt"},
				{rate("job", "culvert_agent_tunnel_repair_packets_sent_total", agents), "repair packets of agents"},
				{rate("job", "culvert_agent_tunnel_bursts_rebuilt_total", agents), "bursts that agents rebuilt"},
			}},
		{kind: bars, title: "Packets that hosts dropped", unit: "short", description: "Packets that the kernel refused to send, and received ones for which a process had no time.",
			queries: []query{
				{events("instance", "culvert_server_udp_send_errors_total", servers), "{{instance}} send"},
				{events("instance", "culvert_server_udp_receive_drops_total", servers), "{{instance}} receive"},
				{events("job", "culvert_agent_udp_send_errors_total", agents), "agents send"},
				{events("job", "culvert_agent_udp_receive_drops_total", agents), "agents receive"},
			}},
	}},
	{"Who is slow?", []panel{
		{title: "Slowest paths", unit: "s", description: "Round-trip time by agent.",
			queries: []query{{`topk(` + most + `, max by (agent_id) (culvert_server_tunnel_rtt_seconds{` + servers + `}))`, "{{agent_id}}"}}},
		{title: "Paths with most loss", unit: "percentunit", description: "Part of the servers' packets that was lost, by agent.",
			queries: []query{{`topk(` + most + `, ` + loss("agent_id", "server", servers) + `)`, "{{agent_id}}"}}},
		{title: "Agents with slow targets", unit: "s", description: "99 % of an agent's connections to targets take at most this.",
			queries: []query{{`topk(` + most + `, ` + quantile("0.99", "le, instance", "culvert_agent_dial_duration_seconds", agents) + `)`, "{{instance}}"}}},
		{title: "Busiest agents", unit: "short", description: "Open streams by agent.",
			queries: []query{{`topk(` + most + `, sum by (agent_id) (culvert_server_tunnel_open_streams{` + servers + `}))`, "{{agent_id}}"}}},
		{title: "Readers that stall", unit: "cps", description: "Times per second that streams wait for memory, because peers do not read.",
			queries: []query{
				{rate("instance", "culvert_server_memory_waits_total", servers), "{{instance}}"},
				{`topk(` + most + `, ` + rate("instance", "culvert_agent_memory_waits_total", agents) + `)`, "{{instance}}"},
			}},
		{title: "Lookups without an answer", unit: "short", description: "Names that agents look up now: a high number is a resolver that does not answer.",
			queries: []query{{`topk(` + most + `, sum by (instance, purpose) (culvert_agent_lookups_pending{` + agents + `}))`, "{{instance}} {{purpose}}"}}},
	}},
	{"Which carrier?", []panel{
		{kind: stacked, title: "Carriers", unit: "short", description: "Agents by the carrier of their tunnel, of each server.",
			queries: []query{{`count by (transport) (culvert_server_tunnel_rtt_seconds{` + servers + `})`, "{{transport}}"}}},
		{kind: stacked, title: "Why", unit: "short", description: "Tunnels of agents by carrier and by the reason for which it was chosen (docs/operations.md §9).",
			queries: []query{{`count by (transport, reason) (culvert_agent_tunnel_since_seconds{` + agents + `})`, "{{transport}}: {{reason}}"}}},
		{kind: bars, title: "New tunnels", unit: "short", description: "By the carrier that they replaced, their own, and the reason. Repeated ones from quic to tcp: a network that sometimes drops UDP.",
			queries: []query{{events("from, to, reason", "culvert_agent_transport_switches_total", agents), "{{from}} to {{to}}: {{reason}}"}}},
		{title: "MTU", unit: "decbytes", description: "UDP payload that is known to pass. A path that stays at 1200 has a small MTU or loses large packets.",
			queries: []query{
				{`min(culvert_server_tunnel_mtu_bytes{` + servers + `})`, "smallest"},
				{`quantile(0.5, culvert_server_tunnel_mtu_bytes{` + servers + `})`, "median"},
			}},
		{title: "UDP buffers", unit: "bytes", description: "Kernel buffers of the servers. Below 1 MiB bursts are lost.",
			queries: []query{{`min by (direction) (culvert_server_udp_buffer_bytes{` + servers + `})`, "{{direction}}"}}},
		{kind: bars, title: "Slower system calls", unit: "short", description: "Times that a sandbox or a path made a process use a slower call (docs/operations.md §8).",
			queries: []query{
				{events("reason", "culvert_server_udp_fallbacks_total", servers), "servers: {{reason}}"},
				{events("reason", "culvert_agent_udp_fallbacks_total", agents), "agents: {{reason}}"},
			}},
	}},
	{"What fails, and why?", []panel{
		{kind: bars, title: "Dials that failed", unit: "short", description: "By reason (docs/operations.md §7). error_response is the target's.",
			queries: []query{{events("reason", "culvert_server_dial_failures_total", servers), "{{reason}}"}}},
		{kind: bars, title: "Targets that failed", unit: "short", description: "How agents fail to reach targets.",
			queries: []query{{events("kind", "culvert_agent_dial_failures_total", agents), "{{kind}}"}}},
		{kind: bars, title: "Agents that did not join", unit: "short", description: "Connections to the agent port that did not become an agent. lost and closed are usual: races of carriers, checks of load balancers.",
			queries: []query{{events("reason", "culvert_server_join_failures_total", servers), "{{reason}}"}}},
		{kind: bars, title: "Identity", unit: "short", description: "Claims that were refused, tokens that were not accepted, and frontends that were refused.",
			queries: []query{
				{events("reason", "culvert_server_identity_conflicts_total", servers), "claim: {{reason}}"},
				{events("result", "culvert_server_token_reviews_total", servers+`, result!="accepted"`), "token: {{result}}"},
				{events("result", "culvert_server_proof_renewals_total", servers+`, result!="accepted"`), "renewal: {{result}}"},
				{events("reason", "culvert_server_frontends_refused_total", servers), "frontend: {{reason}}"},
			}},
		{kind: bars, title: "Egress policy", unit: "short", description: "Addresses that the policy denied, by rule.",
			queries: []query{{events("rule, result", "culvert_agent_egress_denied_total", agents), "{{rule}}: {{result}}"}}},
		{kind: bars, title: "Attempts of agents to connect", unit: "short", description: "Results of attempts to get a tunnel.",
			queries: []query{{events("result", "culvert_agent_connect_attempts_total", agents), "{{result}}"}}},
		{title: "Certificates", unit: "s", description: "Time until the next ones expire.",
			queries: []query{
				{`bottomk(5, min by (instance, file) (culvert_server_certificate_expiry_seconds{` + servers + `}))`, "{{instance}} {{file}}"},
				{`bottomk(5, min by (instance, file) (culvert_agent_certificate_expiry_seconds{` + agents + `}))`, "{{instance}} {{file}}"},
			}},
		{title: "Tokens", unit: "s", description: "Time until the next ones expire. The kubelet replaces a token at four fifths of its life.",
			queries: []query{{`bottomk(5, min by (instance, file) (culvert_agent_token_expiry_seconds{` + agents + `} or culvert_server_token_expiry_seconds{` + servers + `}))`, "{{instance}} {{file}}"}}},
		{title: "Files that cannot be used", unit: "short", description: "The last good contents stay in use until the process restarts.",
			queries: []query{
				{`sum by (job) (culvert_server_reload_failing{` + servers + `})`, "servers of {{job}}"},
				{`sum by (job) (culvert_agent_reload_failing{` + agents + `})`, "agents of {{job}}"},
			}},
	}},
	{"How are the processes?", []panel{
		{title: "CPU", unit: "percentunit", description: "1 is one core.", queries: ofEach("rate(process_cpu_seconds_total{%s}[$__rate_interval])")},
		{title: "Memory", unit: "bytes", description: "Resident memory.", queries: ofEach("process_resident_memory_bytes{%s}")},
		{kind: stacked, title: "Memory for peers", unit: "bytes", description: "What servers hold for peers that do not read or acknowledge, by kind.",
			queries: []query{{`sum by (kind) (culvert_server_memory_held_bytes{` + servers + `})`, "{{kind}}"}}},
		{title: "Use of the memory limit", unit: "percentunit", description: "Part of --memory-limit that is held. At 1 the largest streams are cut.",
			queries: []query{
				{`sum without (kind) (culvert_server_memory_held_bytes{` + servers + `}) / (culvert_server_memory_limit_bytes{` + servers + `} > 0)`, "{{instance}}"},
				{`topk(` + most + `, sum without (kind) (culvert_agent_memory_held_bytes{` + agents + `}) / (culvert_agent_memory_limit_bytes{` + agents + `} > 0))`, "{{instance}}"},
			}},
		{title: "Use of descriptors", unit: "percentunit", description: "Part of the limit of open files that is in use.", queries: ofEach("process_open_fds{%[1]s} / process_max_fds{%[1]s}")},
		{kind: bars, title: "Restarts and lost log lines", unit: "short", description: "Starts of processes, and lines of their logs that were lost.",
			queries: []query{
				{`sum by (job) (changes(process_start_time_seconds{cluster=~"$cluster", job=~"$job"}[$__rate_interval]) and on (job, instance) culvert_build_info)`, "restarts in {{job}}"},
				{events("job", "culvert_log_lines_dropped_total", `cluster=~"$cluster", job=~"$job"`), "log lines in {{job}}"},
			}},
	}},
}
