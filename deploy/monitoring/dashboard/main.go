// Command dashboard writes Grafana's dashboard of Culvert as JSON. Its types are those of Grafana's
// schema, so what it writes is valid.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/cog/variants"
	"github.com/grafana/grafana-foundation-sdk/go/common"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/stat"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"
)

// A query and the legend of its series.
type query struct{ expr, legend string }

// A panel: a number if it has a threshold from which it is red, else a graph.
type panel struct {
	title, description, unit string
	width                    uint32
	queries                  []query
	red                      *float64
	kind                     kind
}

type kind int

const (
	lines kind = iota
	// Numbers of events, one bar for each interval.
	bars
	stacked
	number
)

// The height of panels, in units of the grid, and the width of a row.
const (
	height      = 8
	statHeight  = 4
	defaultSpan = 8
)

var source = common.DataSourceRef{Type: cog.ToPtr("prometheus"), Uid: cog.ToPtr("${datasource}")}

func main() {
	built, err := build().Build()
	if err == nil {
		err = check(built)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// Writes the dashboard, after a check that nothing in it is unknown to the schema.
func check(built dashboard.Dashboard) error {
	text, err := json.MarshalIndent(built, "", "  ")
	if err != nil {
		return err
	}
	plugins.RegisterDefaultPlugins()
	var parsed dashboard.Dashboard
	// Without faults the error is an empty list of them.
	var faults cog.BuildErrors
	if err := parsed.UnmarshalJSONStrict(text); err != nil && (!errors.As(err, &faults) || len(faults) > 0) {
		return err
	}
	if err := parsed.Validate(); err != nil {
		return err
	}
	_, err = fmt.Println(string(text))
	return err
}

func build() *dashboard.DashboardBuilder {
	builder := dashboard.NewDashboardBuilder("Culvert").
		Uid("culvert").
		Description("Servers and agents of Culvert. docs/operations.md of Culvert explains the metrics, and the alerts beside them.").
		Tags([]string{"culvert", "kubernetes"}).
		Editable().
		Tooltip(dashboard.DashboardCursorSyncCrosshair).
		Time("now-3h", "now").
		Timezone("browser").
		Refresh("1m").
		WithVariable(dashboard.NewDatasourceVariableBuilder("datasource").Label("Data source").Type("prometheus")).
		// `All` selects processes without the label too.
		WithVariable(variable("cluster", "Cluster", `label_values(culvert_build_info, cluster)`)).
		WithVariable(variable("job", "Job", `label_values(culvert_build_info{cluster=~"$cluster"}, job)`)).
		WithVariable(variable("server", "Server", `label_values(culvert_server_tunnels{cluster=~"$cluster", job=~"$job"}, instance)`)).
		WithVariable(variable("agent", "Agent", `label_values(konnectivity_network_proxy_agent_open_server_connections{cluster=~"$cluster", job=~"$job"}, instance)`))
	id := uint32(0)
	for _, row := range rows {
		id++
		builder = builder.WithRow(dashboard.NewRowBuilder(row.title).Id(id))
		for _, panel := range row.panels {
			id++
			builder = builder.WithPanel(panel.build(id))
		}
	}
	return builder
}

// A variable with several values, of which all is the default.
func variable(name, label, values string) *dashboard.QueryVariableBuilder {
	all := dashboard.StringOrArrayOfString{ArrayOfString: []string{"$__all"}}
	text := dashboard.StringOrArrayOfString{ArrayOfString: []string{"All"}}
	return dashboard.NewQueryVariableBuilder(name).
		Label(label).
		Datasource(source).
		Query(dashboard.StringOrMap{Map: map[string]any{"query": values, "refId": name, "qryType": 5}}).
		Definition(values).
		Refresh(dashboard.VariableRefreshOnTimeRangeChanged).
		Sort(dashboard.VariableSortNaturalAsc).
		Multi(true).
		IncludeAll(true).
		AllValue(".*").
		Current(dashboard.VariableOption{Selected: cog.ToPtr(true), Text: text, Value: all})
}

func (p panel) build(id uint32) cog.Builder[dashboard.Panel] {
	if p.kind == number {
		return p.number(id)
	}
	return p.graph(id)
}

func (p panel) span() uint32 {
	if p.width == 0 {
		return defaultSpan
	}
	return p.width
}

// The queries, named A, B, C.
func (p panel) targets(instant bool) []cog.Builder[variants.Dataquery] {
	var targets []cog.Builder[variants.Dataquery]
	for index, query := range p.queries {
		target := prometheus.NewDataqueryBuilder().
			RefId(string(rune('A' + index))).
			Datasource(source).
			Expr(query.expr).
			LegendFormat(query.legend)
		if instant {
			target = target.Instant()
		} else {
			target = target.Range()
		}
		targets = append(targets, target)
	}
	return targets
}

func (p panel) number(id uint32) cog.Builder[dashboard.Panel] {
	steps := []dashboard.Threshold{{Color: "green"}}
	if p.red != nil {
		steps = append(steps, dashboard.Threshold{Value: p.red, Color: "red"})
	}
	return stat.NewPanelBuilder().
		Id(id).
		Title(p.title).
		Description(p.description).
		Datasource(source).
		Unit(p.unit).
		Height(statHeight).
		Span(p.span()).
		Targets(p.targets(true)).
		Thresholds(dashboard.NewThresholdsConfigBuilder().Mode(dashboard.ThresholdsModeAbsolute).Steps(steps)).
		ReduceOptions(common.NewReduceDataOptionsBuilder().Calcs([]string{"lastNotNull"})).
		Orientation(common.VizOrientationAuto).
		GraphMode(common.BigValueGraphModeNone).
		ColorMode(common.BigValueColorModeValue)
}

func (p panel) graph(id uint32) cog.Builder[dashboard.Panel] {
	calcs, sort := []string{"lastNotNull", "max"}, "Max"
	if p.kind == bars {
		calcs, sort = []string{"sum"}, "Total"
	}
	graph := timeseries.NewPanelBuilder().
		Id(id).
		Title(p.title).
		Description(p.description).
		Datasource(source).
		Unit(p.unit).
		Min(0).
		Height(height).
		Span(p.span()).
		Targets(p.targets(false)).
		Legend(common.NewVizLegendOptionsBuilder().
			ShowLegend(true).
			DisplayMode(common.LegendDisplayModeTable).
			Placement(common.LegendPlacementBottom).
			Calcs(calcs).
			SortBy(sort).
			SortDesc(true)).
		Tooltip(common.NewVizTooltipOptionsBuilder().
			Mode(common.TooltipDisplayModeMulti).
			Sort(common.SortOrderDescending))
	switch p.kind {
	case bars:
		// Most reasons never occur: they are in neither legend nor tooltip.
		graph = graph.DrawStyle(common.GraphDrawStyleBars).FillOpacity(80).
			Stacking(common.NewStackingConfigBuilder().Mode(common.StackingModeNormal).Group("A")).
			WithOverride(
				dashboard.MatcherConfig{Id: "byValue", Options: map[string]any{"reducer": "allIsZero", "op": "gte", "value": 0}},
				[]dashboard.DynamicConfigValue{{Id: "custom.hideFrom", Value: map[string]bool{"legend": true, "tooltip": true, "viz": false}}},
			)
	case stacked:
		graph = graph.FillOpacity(20).
			Stacking(common.NewStackingConfigBuilder().Mode(common.StackingModeNormal).Group("A"))
	default:
		graph = graph.FillOpacity(0)
	}
	return graph
}
